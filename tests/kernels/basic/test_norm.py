"""The norm kernels against float64, rounded where the contract says."""

import itertools

import pytest
import torch
from torch import Tensor

from gfxlm.kernels.basic.norm import layer_norm, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def close(out: Tensor, exact: Tensor, roundings: int, slack: float = 1e-6) -> None:
    """Within so many roundings of the result's type, and fp32's noise."""
    step = torch.finfo(out.dtype).eps / 2
    bound = roundings * step * exact.abs() + slack * (1 + exact.abs())
    assert out.isfinite().all()
    assert ((out.cpu().double() - exact).abs() <= bound).all()


def rms(x: Tensor) -> Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()


def weighted(normed: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The contract: rounded to dtype before the weight."""
    return normed if weight is None else normed.to(dtype).double() * weight.double()


@pytest.mark.parametrize("width", [1, 3, 64, 80, 128, 250, 1000, 2048, 5120, 8192, 17000])
@pytest.mark.parametrize(("dtype", "weight_type"), list(itertools.product(TYPES, [None, *TYPES])))
def test_rms_norm(width: int, dtype: torch.dtype, weight_type: torch.dtype | None) -> None:
    if width > 2048 and weight_type not in (None, dtype):
        pytest.skip("types are covered by the narrower rows")
    x = (3 * torch.randn(3, width)).to(dtype)
    weight = None if weight_type is None else torch.randn(width).to(weight_type)
    result = dtype if weight_type is None else torch.promote_types(dtype, weight_type)
    out, none = rms_norm(x.to(DEVICE), None if weight is None else weight.to(DEVICE), EPS, result)
    assert none is None
    assert out.dtype == result
    # A value next to a rounding boundary may fall either way before the weight: one more rounding.
    close(out, weighted(rms(x), weight, result), 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_before_the_weight(dtype: torch.dtype) -> None:
    x, weight = torch.randn(16, 1024).to(dtype), torch.randn(1024).to(dtype)
    out, _ = rms_norm(x.to(DEVICE), weight.to(DEVICE), EPS, dtype)
    same = out.cpu() == rms(x).to(dtype) * weight
    assert same.float().mean() > 0.999  # the weight first would leave about three in four


@pytest.mark.parametrize("shape", [(1, 9000), (5, 128), (2, 3, 64)])
@pytest.mark.parametrize("dtype", TYPES)
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), (5 * torch.randn(shape)).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    out, total = rms_norm(x.to(DEVICE), weight.to(DEVICE), EPS, dtype, residual=residual.to(DEVICE))
    assert total is not None
    assert torch.equal(total.cpu(), x + residual)
    close(out, weighted(rms(x + residual), weight, dtype), 3)


@pytest.mark.parametrize("gate_type", [torch.float32, torch.bfloat16])
def test_gated_rms_norm(gate_type: torch.dtype) -> None:
    y = torch.randn(4, 5, 128)
    projected = torch.randn(4, 3 * 5 * 128).to(gate_type)
    gate = projected.view(4, 5, 3 * 128)[..., 128:256]  # a strided part of a projection
    weight = torch.randn(128).bfloat16()
    out, _ = rms_norm(y.to(DEVICE), weight.to(DEVICE), EPS, torch.float32, gate=gate.to(DEVICE))
    assert out.dtype == gate_type
    wide = gate.double()
    close(out, rms(y) * weight.double() * wide / (1 + (-wide).exp()), 4)


@pytest.mark.parametrize("width", [64, 128, 300])
@pytest.mark.parametrize("dtype", TYPES)
def test_l2_norm(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, width).to(dtype)
    x[0, 0] = 0
    out, _ = rms_norm(x.to(DEVICE), None, 1e-6, torch.float32, mean=False)
    wide = x.double()
    close(out, wide / (wide.square().sum(-1, keepdim=True) + 1e-6).sqrt(), 3)


@pytest.mark.parametrize("width", [1, 65, 1000, 20000])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("affine", [(False, False), (True, False), (False, True), (True, True)])
def test_layer_norm(width: int, dtype: torch.dtype, affine: tuple[bool, bool]) -> None:
    x = (torch.randn(3, width) + 4).to(dtype)
    weight, bias = (torch.randn(width).to(dtype) if wanted else None for wanted in affine)
    given = [None if t is None else t.to(DEVICE) for t in (weight, bias)]
    out = layer_norm(x.to(DEVICE), *given, EPS, dtype)
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normed = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    exact = weighted(normed, weight, dtype)
    if bias is not None:
        exact = exact.to(dtype).double() + bias.double()
    # Roundings are of the terms of the last sum, whose size is at most a row's largest.
    step = torch.finfo(dtype).eps / 2
    bound = 4 * step * (exact.abs() + (0 if bias is None else bias.double().abs())) + 1e-5 * (1 + exact.abs())
    assert ((out.cpu().double() - exact).abs() <= bound).all()


def test_leading_strides() -> None:
    weight = torch.randn(128)
    big = torch.randn(3, 4, 5, 256)
    views = [
        big[..., :128],  # one step between rows
        big[:, :2, :, 128:],  # two
        big[:2, ::2, 1:4, :128],  # three: copied
        big[0, 0, 0, :128],
        big[:, 0, :0, :128],
        big[0, 0, 0, :128].expand(6, 128),
        big[..., ::2],  # columns apart: copied
        big[0, 0].mT[:128].contiguous().mT[:, :128],
    ]
    for x in views:
        out, _ = rms_norm(x.to(DEVICE) if DEVICE == "cpu" else on(x), weight.to(DEVICE), EPS, torch.float32)
        assert out.shape == x.shape
        close(out, rms(x) * weight.double(), 3)


def on(x: Tensor) -> Tensor:
    """x with its strides, on the device."""
    storage = torch.zeros(x.untyped_storage().nbytes() // 4, device=DEVICE)
    view = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    if 0 not in x.stride():
        return view.copy_(x)
    return x.to(DEVICE)


def test_statistics_do_not_overflow() -> None:
    x = torch.full((1, 8), 1000.0, dtype=torch.float16, device=DEVICE)  # 1000² overflows float16
    assert torch.equal(rms_norm(x, None, EPS, torch.float16)[0], torch.ones_like(x))
