"""One token through a mixer, against the formulas in float64."""

import pytest
import torch
from torch import Tensor

from gfxlm.kernels.delta.step import delta_step
from tests.kernels.delta.oracle import DEVICE, Mixer


def run(
    m: Mixer, qkvz: Tensor, ba: Tensor, positions: list[int], slots: list[int], ring: Tensor, state: Tensor
) -> Tensor:
    weights = (t.to(DEVICE) for t in (m.conv, m.A_log, m.dt_bias, m.norm))
    where = (torch.tensor(x, device=DEVICE) for x in (positions, slots))
    return delta_step(qkvz, ba, *weights, m.eps, m.k_heads, *where, ring, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 2, 16, 16, 4),
        (1, 3, 24, 40, 3),
        (3, 1, 64, 32, 2),
        (1, 2, 128, 128, 4),
        (1, 1, 200, 160, 5),
        (1, 1, 16, 256, 1),
    ],
    ids=str,
)
def test_against_float64(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    m = Mixer(*sizes, dtype=dtype)
    positions, slots = [0, 2, 7, 5], [2, 0, -1, 3]
    qkvz, ba = m.projections(4)
    ring, state = m.caches(4)
    exact_ring, exact_state = ring.double().cpu(), state.double().cpu()
    ring[2], state[2] = torch.nan, torch.nan  # whatever lies in the slot of a sequence that starts
    y = run(m, qkvz, ba, positions, slots, ring, state).cpu()
    assert (y.dtype, y.shape) == (dtype, (4, m.v_heads * m.v_dim))
    assert (y[2] == 0).all()
    for i in (0, 1, 3):
        last = slots[i]
        exact = m.sequence(qkvz[i : i + 1], ba[i : i + 1], positions[i], exact_ring[last], exact_state[last]).flatten()
        # One rounding of the result, and fp32's own on the way.
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * exact.abs().max()
        assert ((y[i].double() - exact).abs() <= bound).all()
        torch.testing.assert_close(state[last].cpu().double(), exact_state[last], rtol=1e-5, atol=1e-5)
        new = positions[i] % m.taps
        assert torch.equal(ring[last, new].cpu().double(), exact_ring[last, new])
    assert torch.equal(ring[[0, 1, 3]].cpu().double(), exact_ring[[0, 1, 3]])
    assert torch.equal(state[1].cpu().double(), exact_state[1])


def test_token_by_token() -> None:
    m = Mixer(1, 2, 16, 16)
    qkvz, ba = m.projections(6)
    ring, state = m.caches(1)
    exact = m.sequence(qkvz, ba, 0, ring[0].double().cpu(), state[0].double().cpu()).flatten(1)
    y = torch.cat([run(m, qkvz[t : t + 1], ba[t : t + 1], [t], [0], ring, state) for t in range(6)])
    torch.testing.assert_close(y.double().cpu(), exact, rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    m = Mixer(1, 1, 16, 16)
    assert run(m, *m.projections(0), [], [], *m.caches(1)).shape == (0, 16)


def test_decay_far_out() -> None:
    """Gates at the ends of their ranges: no infinity on the way."""
    m = Mixer(1, 4, 16, 16)
    m.A_log = torch.tensor([-10.0, 0.0, 3.0, 5.0])
    for a in (-90.0, -20.0, 0.0, 90.0):
        qkvz, ba = m.projections(1)
        ba = torch.tensor([[-100.0, 100.0, 0.0, 5.0] + [a] * 4], device=DEVICE)
        ring, state = m.caches(1)
        exact_ring, exact_state = ring[0].double().cpu(), state[0].double().cpu()
        exact = m.sequence(qkvz, ba, 3, exact_ring, exact_state).flatten()
        y = run(m, qkvz, ba, [3], [0], ring, state)[0]
        torch.testing.assert_close(y.double().cpu(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state[0].double().cpu(), exact_state, rtol=3e-5, atol=1e-6)
