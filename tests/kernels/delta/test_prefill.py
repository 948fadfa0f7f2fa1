"""Sequences laid end to end through convolution, gates, rule and norm, against the formulas in float64."""

import pytest
import torch

from gfxlm.kernels.batch import Batch, Span
from gfxlm.kernels.delta.chunks import delta_chunked
from gfxlm.kernels.delta.prepare import gated_norm, prepare
from gfxlm.kernels.delta.recurrent import delta_recurrent
from tests.kernels.delta.oracle import DEVICE, Mixer


def check(m: Mixer, lengths: list[int], starts: list[int], slots: list[int]) -> None:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    bounds = tuple((end - length, end) for end, length in zip(ends, lengths, strict=True))
    positions = torch.tensor([p for n, first in zip(lengths, starts, strict=True) for p in range(first, first + n)])
    index = torch.tensor([slot for n, slot in zip(lengths, slots, strict=True) for _ in range(n)])
    positions, index = positions.to(DEVICE), index.to(DEVICE)
    qkvz, ba = m.projections(ends[-1])
    ring, state = m.caches(max(slots) + 2)
    exact_ring, exact_state = ring.double().cpu(), state.double().cpu()
    for first, slot in zip(starts, slots, strict=True):
        if first == 0:
            ring[slot], state[slot] = torch.nan, torch.nan
    conv, A_log, dt_bias, norm = (t.to(DEVICE) for t in (m.conv, m.A_log, m.dt_bias, m.norm))
    spans = [Span(slot, *bound, bound[1]) for slot, bound in zip(slots, bounds, strict=True)]
    batch = Batch(spans, qkvz.device)
    qkv, gamma, beta = prepare(
        qkvz, ba, conv, A_log, dt_bias, m.k_heads, m.v_dim, positions, index, ring, batch
    )  # fmt: skip
    keys = m.k_heads * m.k_dim
    q, k, v = qkv.split([keys, keys, m.v_heads * m.v_dim], -1)
    q, k, v = (x.unflatten(-1, (-1, dim)) for x, dim in ((q, m.k_dim), (k, m.k_dim), (v, m.v_dim)))
    if m.dtype == torch.float32:
        y = delta_recurrent(q, k, v, gamma, beta, state, batch, m.dtype, index, positions)
    else:
        y = delta_chunked(q, k, v, gamma, beta, state, batch, index, positions)
    out = gated_norm(y, qkvz, norm, m.eps, m.k_heads, m.k_dim).cpu()
    assert (out.dtype, out.shape) == (m.dtype, (ends[-1], m.v_heads * m.v_dim))
    # Half types round what meets the matrix units: a few roundings, none of them systematic.
    bound = 1e-5 if m.dtype == torch.float32 else torch.finfo(m.dtype).eps
    untouched = set(range(len(state)))
    for (start, stop), first, slot in zip(bounds, starts, slots, strict=True):
        exact = m.sequence(qkvz[start:stop], ba[start:stop], first, exact_ring[slot], exact_state[slot]).flatten(1)
        error = out[start:stop].double() - exact
        assert error.square().mean().sqrt() <= bound * exact.square().mean().sqrt()
        error = state[slot].cpu().double() - exact_state[slot]
        assert error.square().mean().sqrt() <= bound * exact_state[slot].square().mean().sqrt()
        for position in range(max(0, first + stop - start - m.taps + 1), first + stop - start):
            assert torch.equal(ring[slot, position % m.taps].cpu().double(), exact_ring[slot, position % m.taps])
        untouched.remove(slot)
    for slot in untouched:
        assert torch.equal(ring[slot].cpu().double(), exact_ring[slot])
        assert torch.equal(state[slot].cpu().double(), exact_state[slot])


@pytest.mark.parametrize("sizes", [(1, 3, 24, 40, 3), (1, 1, 96, 200, 2)], ids=str)
def test_chunks(sizes: tuple[int, ...]) -> None:
    check(Mixer(*sizes, dtype=torch.bfloat16), [70, 1, 2, 200, 64], [0, 5, 0, 3, 64], [3, 1, 5, 0, 4])


def test_chunks_of_float16() -> None:
    check(Mixer(2, 2, 16, 16, 4, dtype=torch.float16), [70, 3], [2, 0], [0, 2])


@pytest.mark.parametrize("sizes", [(1, 2, 16, 16, 4), (1, 1, 24, 20, 5)], ids=str)
def test_steps(sizes: tuple[int, ...]) -> None:
    check(Mixer(*sizes), [21, 1, 2], [0, 5, 7], [1, 2, 0])


def test_real_heads() -> None:
    check(Mixer(1, 2, 128, 128, dtype=torch.bfloat16), [130], [0], [0])
