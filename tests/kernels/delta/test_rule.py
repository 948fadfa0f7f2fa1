"""The rule alone: decays of every size, keys that agree, lengths around the chunk, decay per key feature."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.kernels.batch import Batch, Span
from gfxlm.kernels.delta.chunks import delta_chunked
from gfxlm.kernels.delta.recurrent import delta_recurrent
from tests.kernels.delta.oracle import DEVICE, rule

DECAYS = {
    "mild": lambda shape: torch.rand(shape) ** 0.1,
    "any": torch.rand,
    "none": torch.ones,
    "e^-20": lambda shape: torch.full(shape, -20.0).exp(),
    "zero": torch.zeros,
    "now and then zero": lambda shape: (torch.rand(shape) > 0.05) * 0.999,
}


def inputs(rows: int, dtype: torch.dtype, decay: str = "mild", k_heads: int = 1, v_heads: int = 2) -> list[Tensor]:
    q = F.normalize(torch.randn(rows, k_heads, 16), dim=-1) * 16**-0.5
    k = F.normalize(torch.randn(rows, k_heads, 16), dim=-1)
    halves = [q, k, torch.randn(rows, v_heads, 32)]
    gates = [DECAYS[decay]((rows, v_heads)), torch.rand(rows, v_heads)]
    return [t.to(dtype).to(DEVICE) for t in halves] + [t.float().to(DEVICE) for t in gates]


def check(x: list[Tensor], lengths: list[int], dtype: torch.dtype, bound: float) -> None:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    bounds = tuple((end - length, end) for end, length in zip(ends, lengths, strict=True))
    state = torch.randn(len(lengths), x[2].shape[1], 32, 16, device=DEVICE)
    exact_state = state.double().cpu()
    full = dtype == torch.float32
    spans = [Span(i, first, stop, stop - first) for i, (first, stop) in enumerate(bounds)]
    batch = Batch(spans, state.device)
    y = delta_recurrent(*x, state, batch, dtype) if full else delta_chunked(*x, state, batch)
    for i, (first, stop) in enumerate(bounds):
        exact = rule(*(t[first:stop] for t in x), exact_state[i])
        for out, wanted in ((y[first:stop].cpu(), exact), (state[i].cpu(), exact_state[i])):
            error = out.double() - wanted
            assert error.square().mean().sqrt() <= bound * wanted.square().mean().sqrt()


@pytest.mark.parametrize("decay", list(DECAYS))
def test_any_decay(decay: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check(inputs(150, dtype, decay), [150], dtype, torch.finfo(dtype).eps)
    check(inputs(9, torch.float32, decay), [9], torch.float32, 1e-6)


@pytest.mark.parametrize("lengths", [[1], [63], [64], [65], [128], [1, 64, 17, 127]], ids=str)
def test_lengths(lengths: list[int]) -> None:
    check(inputs(sum(lengths), torch.bfloat16, "any", 2, 4), lengths, torch.bfloat16, 2**-7)


@pytest.mark.parametrize(("rate", "bound"), [(1.0, 2**-9), (2.0, 16 * 2**-10)])
def test_keys_that_agree(rate: float, bound: float) -> None:
    """The triangle is full of its largest numbers; at rate 2 a correction is a sum of 64 values, signs alternating."""
    x = inputs(128, torch.float16, "none")
    x[1][:] = x[1][:1]
    x[4][:] = rate
    check(x, [128], torch.float16, bound)


def test_decay_per_key_feature() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, _, beta = inputs(7, dtype)
        gamma = torch.rand(7, 2, 16, device=DEVICE)
        state = torch.randn(1, 2, 32, 16, device=DEVICE)
        exact_state = state.double().cpu()
        y = delta_recurrent(q, k, v, gamma, beta, state, Batch([Span(0, 0, 7, 7)], q.device), dtype).cpu()
        exact = rule(q, k, v, gamma, beta, exact_state[0])
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
        assert ((y.double() - exact).abs() <= bound).all()
        torch.testing.assert_close(state.cpu().double(), exact_state, rtol=1e-6, atol=1e-6)
