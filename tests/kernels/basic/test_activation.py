"""Softmax and gated activation kernels against float64."""

import math

import pytest
import torch

from gfxlm.kernels.basic.activation import softmax, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("width", [1, 50, 128, 1000, 8192, 30000])
@pytest.mark.parametrize("dtype", TYPES)
def test_softmax(width: int, dtype: torch.dtype) -> None:
    x = (5 * torch.randn(4, width)).to(dtype)
    out = softmax(x.to(DEVICE), dtype)
    exact = x.double().softmax(-1)
    # exp turns the rounding of its argument's product with log2(e) into a relative error.
    distance = x.double().amax(-1, keepdim=True) - x.double()
    bound = (torch.finfo(dtype).eps / 2 + 2.0**-22 * (2 + distance)) * exact + torch.finfo(dtype).tiny
    assert out.dtype == dtype
    if dtype == torch.float16:
        bound = bound + 2.0**-25  # half a step of its subnormal numbers
    assert ((out.cpu().double() - exact).abs() <= bound).all()


def test_softmax_of_infinities() -> None:
    inf = math.inf
    for width in (2, 9000):
        x = torch.full((5, width), -inf)
        x[1, 0] = 0
        x[2, :2] = torch.tensor([inf, 0])
        x[3, 1] = math.nan
        x[4, :2] = 3
        out = softmax(x.to(DEVICE), torch.float32).cpu()
        assert out.isnan().all(-1).tolist() == [True, False, True, True, False]
        assert out[1, :2].tolist() == [1, 0]
        assert out[4, :2].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("shape", [(5,), (3, 100), (2, 3, 1500), (0, 4), (2, 0), (20, 7)])
@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    both = (4 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype).to(DEVICE)
    gate, x = both.chunk(2, -1)
    out = swiglu(gate, x, dtype)
    wide = gate.double().cpu()
    exact = wide / (1 + (-wide).exp()) * x.double().cpu()
    assert out.shape == shape
    # exp(-gate) is off by a few units of fp32 times its argument.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-21 * (2 + wide.abs()) * exact.abs()
    subnormal = 2.0**-25 if dtype == torch.float16 else 0.0
    assert ((out.cpu().double() - exact).abs() <= bound + subnormal).all()


def test_swiglu_of_large_gates() -> None:
    gate = torch.tensor([-200.0, -89.0, 89.0, 200.0], device=DEVICE)
    out = swiglu(gate, torch.ones_like(gate), torch.float32).cpu()
    assert out[2:].tolist() == [89, 200]
    assert (out[:2].abs() < 1e-30).all()


def test_mixed_types() -> None:
    gate, x = torch.randn(3, 5).bfloat16(), torch.randn(3, 5)
    out = swiglu(gate.to(DEVICE), x.to(DEVICE), torch.float32).cpu()
    torch.testing.assert_close(out, torch.nn.functional.silu(gate.float()) * x)
