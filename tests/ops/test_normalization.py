import itertools

import mlx.core as mx
import pytest
import torch
from mlx_lm.models.gated_delta import normalize_qk
from torch import Tensor

from gfxlm import ops
from tests.mlx_bridge import to_mlx, to_torch

HALF_TYPES = [torch.float16, torch.bfloat16]
FLOAT_TYPES = [torch.float32, *HALF_TYPES]


def rounding(dtype: torch.dtype) -> float:
    """The relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def exact(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool) -> Tensor:
    """Statistics in float64, rounded to x's type, then weight and bias in x's type."""
    wide = x.double()
    if centre:
        wide = wide - wide.mean(-1, keepdim=True)
    out = (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("centre", [False, True])
def test_rounds_before_the_weight(dtype: torch.dtype, centre: bool) -> None:
    x, weight, bias = (torch.randn(n, 1024).to(dtype) for n in (64, 1, 1))
    weight, bias = weight[0], bias[0]
    out = ops.layer_norm(x, weight, bias, 1e-5) if centre else ops.rms_norm(x, weight, 1e-5)
    same = out == exact(x, weight, bias if centre else None, 1e-5, centre)
    assert same.float().mean() > 0.999  # weight first would leave about three in four


@pytest.mark.parametrize("x_type", FLOAT_TYPES)
@pytest.mark.parametrize("w_type", [*FLOAT_TYPES, None])
@pytest.mark.parametrize("shape", [(2, 31), (3, 2, 33), (4099,), (0, 8)])
def test_rms_norm_is_mlx(x_type: torch.dtype, w_type: torch.dtype | None, shape: tuple[int, ...]) -> None:
    x = (3 * torch.randn(shape)).to(x_type)
    weight = None if w_type is None else torch.randn(shape[-1]).to(w_type)
    out = ops.rms_norm(x, weight, 1e-3)
    expected = to_torch(mx.fast.rms_norm(to_mlx(x), None if weight is None else to_mlx(weight), 1e-3))
    assert out.dtype == expected.dtype
    # MLX adds up 4099 squares one by one and is off by up to 3e-6 itself; the float64 test below is sharp.
    torch.testing.assert_close(out, expected, rtol=4 * rounding(out.dtype) + 5e-6, atol=1e-6)


@pytest.mark.parametrize("x_type", FLOAT_TYPES)
@pytest.mark.parametrize(("w_type", "b_type"), list(itertools.product([None, *FLOAT_TYPES], repeat=2)))
def test_layer_norm_is_mlx(x_type: torch.dtype, w_type: torch.dtype | None, b_type: torch.dtype | None) -> None:
    x = torch.randn(5, 65).to(x_type)
    weight, bias = (None if t is None else torch.randn(65).to(t) for t in (w_type, b_type))
    out = ops.layer_norm(x, weight, bias, 1e-5)
    given = [None if t is None else to_mlx(t) for t in (weight, bias)]
    expected = to_torch(mx.fast.layer_norm(to_mlx(x), *given, 1e-5))
    assert out.dtype == expected.dtype
    # The sum of product and bias may cancel: the error is one of the terms, of size 4 or less.
    torch.testing.assert_close(out, expected, rtol=4 * rounding(out.dtype), atol=16 * rounding(out.dtype))


@pytest.mark.parametrize("width", [31, 4099])
def test_float32_is_exact_to_rounding(width: int) -> None:
    x = 3 * torch.randn(16, width)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(ops.rms_norm(x, None, 1e-3).double(), expected, rtol=6 * rounding(x.dtype), atol=0)


def test_rms_norm_squares_in_float32() -> None:
    x = torch.full((1, 8), 1000.0, dtype=torch.float16)  # 1000² overflows float16
    assert torch.equal(ops.rms_norm(x, None, 1e-5), torch.ones_like(x))


def test_layer_norm_of_a_large_offset() -> None:
    x = torch.randn(4, 256) + 1000
    torch.testing.assert_close(
        ops.layer_norm(x, None, None, 1e-5).double(),
        exact(x, None, None, 1e-5, True).double(),
        rtol=0,
        atol=5e-4,
    )


def test_strided_rows() -> None:
    x = torch.randn(8, 100, 128)[:, 99:]
    torch.testing.assert_close(ops.layer_norm(x, None, None, 1e-5), ops.layer_norm(x.contiguous(), None, None, 1e-5))
    x = torch.randn(16, 8).T
    torch.testing.assert_close(ops.rms_norm(x, None, 1e-5), ops.rms_norm(x.contiguous(), None, 1e-5))


def test_l2_normalize_is_mlx_lm() -> None:
    k = torch.randn(3, 5, 2, 64)
    k[0, 0, 0] = 0
    k[1] *= 1e-3
    _, expected = normalize_qk(to_mlx(k), to_mlx(k), inv_scale=64**-0.5, eps=1e-6)
    torch.testing.assert_close(ops.l2_normalize(k), to_torch(expected), rtol=1e-6, atol=1e-7)
    assert ops.l2_normalize(k.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_gradients(op: str) -> None:
    x, *rest = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 6), (6,), (6,)))
    rest = rest[:1] if op == "rms_norm" else rest
    assert torch.autograd.gradcheck(lambda *args: getattr(ops, op)(*args, 1e-5), (x, *rest))
    assert torch.autograd.gradgradcheck(lambda *args: getattr(ops, op)(*args, 1e-5), (x, *rest))


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.rms_norm(torch.ones(1, 5), torch.ones(4), 1e-5),
        lambda: ops.rms_norm(torch.ones(1, 5), torch.ones(1), 1e-5),
        lambda: ops.rms_norm(torch.ones(1, 5), torch.ones(1, 5), 1e-5),
        lambda: ops.layer_norm(torch.ones(4, 128), torch.ones(129), None, 1e-3),
    ],
)
def test_wrong_weight(call) -> None:
    with pytest.raises(ValueError, match="weight must have shape"):
        call()


def test_other_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="bias must have shape"):
        ops.layer_norm(torch.ones(4, 128), None, torch.ones(129), 1e-3)
    with pytest.raises(ValueError, match="at least one dimension"):
        ops.rms_norm(torch.tensor(1.0), None, 1e-5)
    with pytest.raises(ValueError, match="must be floating"):
        ops.layer_norm(torch.ones(2, 3, dtype=torch.int32), None, torch.ones(3), 1e-5)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_add_and_gate_are_their_parts(dtype: torch.dtype) -> None:
    x, y, weight = torch.randn(3, 4, 64).to(dtype), torch.randn(3, 4, 64).to(dtype), torch.randn(64).to(dtype)
    normed, total = ops.add_rms_norm(x, y, weight, 1e-5)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, ops.rms_norm(x + y, weight, 1e-5))
    gated = ops.gated_rms_norm(x.float(), y, weight, 1e-5)
    assert gated.dtype == dtype
    silu = torch.nn.functional.silu(y.float())
    assert torch.equal(gated, (ops.rms_norm(x.float(), weight, 1e-5) * silu).to(dtype))
    with pytest.raises(ValueError, match=r"residual must have x's shape \(3, 4, 64\), got \(64,\)"):
        ops.add_rms_norm(x, weight, weight, 1e-5)
    with pytest.raises(ValueError, match="gate must be floating"):
        ops.gated_rms_norm(x, y.int(), weight, 1e-5)
