"""Writing out quantised matrices, and their products with many rows, against float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gfxlm.kernels.linear.dequantize import dequantize
from gfxlm.kernels.linear.wide import by_blas, fused, wide
from gfxlm.kernels.packed import Packed
from gfxlm.ops.quantized import dequantize as reference
from gfxlm.ops.quantized import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOISE = 2e-6  # of fp32 sums, relative to the sum of their terms' sizes
AFFINE4 = (64, 4, "affine")
FORMATS = [
    AFFINE4,
    (32, 4, "affine"),
    (128, 4, "affine"),
    (64, 2, "affine"),
    (128, 2, "affine"),
    (32, 3, "affine"),
    (64, 5, "affine"),
    (128, 6, "affine"),
    (64, 8, "affine"),
    (32, 4, "mxfp4"),
    (32, 8, "mxfp8"),
    (16, 4, "nvfp4"),
]
TILE = {"block_n": 32, "block_m": 16, "block_k": 64, "splits": 1, "num_warps": 4}


def packed(
    shape: tuple[int, ...], quantization: tuple[int, int, str], dtype: torch.dtype, *, pairs: bool = True
) -> tuple[Packed, Tensor]:
    """A random matrix or stack as kernels take it, and its exact numbers."""
    w_q, scales, *rest = quantize(torch.randn(shape, dtype=dtype), *quantization)
    biases = rest[0] if rest else None
    exact = reference(w_q, scales, biases, *quantization, dtype=torch.float64).to(DEVICE)
    if biases is not None and pairs:
        scales, biases = torch.stack((scales, biases), -1).to(DEVICE).unbind(-1)
    return Packed.of(
        w_q.to(DEVICE), scales.to(DEVICE), None if biases is None else biases.to(DEVICE), *quantization
    ), exact


def check(y: Tensor, x: Tensor, w: Tensor, added: Tensor | float = 0.0, *, rounded: bool) -> None:
    """y is x @ w.T + added, rounded once; `rounded`: each weight may have been rounded to x's type before."""
    unit = torch.finfo(x.dtype).eps / 2
    expected = x.double() @ w.T + added
    size = x.double().abs() @ w.abs().T
    bound = unit * expected.abs() + (NOISE + (unit if rounded else 0)) * (size + expected.abs())
    assert y.dtype == x.dtype
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize_rounds_once(quantization: tuple[int, int, str], dtype: torch.dtype) -> None:
    weight, exact = packed((5, 640), quantization, dtype)
    assert torch.equal(dequantize(weight, dtype), exact.to(dtype))


@pytest.mark.parametrize("quantization", FORMATS)
def test_dequantize_in_fp32(quantization: tuple[int, int, str]) -> None:
    weight, exact = packed((5, 640), quantization, torch.float32)
    unit = torch.finfo(torch.float32).eps / 2
    # The interpreter has no fused multiply-add: scale * code, at most twice the greatest weight, is rounded as well.
    assert ((dequantize(weight, torch.float32) - exact).abs() <= unit * (exact.abs() + 2 * exact.abs().max())).all()


def test_dequantize_a_stack_into_a_given_tensor() -> None:
    weight, exact = packed((3, 7, 192), AFFINE4, torch.bfloat16, pairs=False)
    out = torch.empty(3, 7, 192, device=DEVICE)
    assert dequantize(weight, torch.float32, out) is out
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-7 * float(exact.abs().max()))


def test_dequantize_a_slice_of_rows() -> None:
    weight, exact = packed((40, 128), AFFINE4, torch.float16)
    assert weight.biases is not None
    part = replace(weight, words=weight.words[8:24], scales=weight.scales[8:24], biases=weight.biases[8:24])
    assert torch.equal(dequantize(part, torch.float16), exact[8:24].half())


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("unpack", ["plain", "sums"])
def test_fused(quantization: tuple[int, int, str], unpack: str) -> None:
    weight, exact = packed((37, 384), quantization, torch.bfloat16)
    x = torch.randn(19, 384, dtype=torch.bfloat16, device=DEVICE)
    check(fused(x, weight, {**TILE, "unpack": unpack}), x, exact, rounded=True)


@pytest.mark.parametrize("quantization", [AFFINE4, (128, 4, "affine"), (128, 2, "affine")])
def test_sums_round_no_weight(quantization: tuple[int, int, str]) -> None:
    weight, exact = packed((37, 384), quantization, torch.bfloat16)
    x = torch.randn(19, 384, dtype=torch.bfloat16, device=DEVICE)
    check(fused(x, weight, {**TILE, "unpack": "sums"}), x, exact, rounded=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_fused_in_other_types(dtype: torch.dtype, bits: int) -> None:
    weight, exact = packed((40, 256), (64, bits, "affine"), dtype)
    x = torch.randn(33, 256, dtype=dtype, device=DEVICE)
    check(fused(x, weight, {**TILE, "unpack": "sums"}), x, exact, rounded=dtype == torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu" or torch.version.hip is not None, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ptx_rounds_weights_once(dtype: torch.dtype) -> None:
    weight, exact = packed((130, 512), AFFINE4, dtype)
    x = torch.randn(70, 512, dtype=dtype, device=DEVICE)
    tile = {"block_n": 64, "block_m": 32, "block_k": 128, "num_warps": 4, "num_stages": 3, "unpack": "ptx"}
    for splits in (1, 2, 3):
        check(fused(x, weight, {**tile, "splits": splits}), x, exact.to(dtype).double(), rounded=False)


@pytest.mark.parametrize("unpack", ["plain", "sums"])
@pytest.mark.parametrize(("k", "splits"), [(384, 3), (384, 4), (448, 2), (448, 3), (64, 8), (576, 8)])
def test_shares_of_k(k: int, splits: int, unpack: str) -> None:
    """Equal ones, a last one that is shorter or ends within a tile, and more of them than there are tiles."""
    weight, exact = packed((37, k), AFFINE4, torch.bfloat16)
    x = torch.randn(19, k, dtype=torch.bfloat16, device=DEVICE)
    bias, residual = torch.randn(37, device=DEVICE), torch.randn(37, 19, device=DEVICE).T
    added = bias.bfloat16(), residual.bfloat16()
    tile = {**TILE, "block_k": 128 if unpack == "plain" else 64, "splits": splits, "unpack": unpack}
    y = fused(x, weight, tile, bias=added[0], residual=added[1])
    check(y, x, exact, added[0].double() + added[1].double(), rounded=True)


def test_shares_of_k_of_other_formats() -> None:
    for quantization in ((32, 3, "affine"), (64, 8, "affine"), (16, 4, "nvfp4")):
        weight, exact = packed((40, 512), quantization, torch.float16)
        x = torch.randn(33, 512, dtype=torch.float16, device=DEVICE)
        check(fused(x, weight, {**TILE, "splits": 3, "unpack": "sums"}), x, exact, rounded=True)


def test_a_share_does_not_depend_on_company() -> None:
    """The same rows of x give the same bits in a tile of their own and next to others."""
    weight, _ = packed((70, 512), AFFINE4, torch.bfloat16)
    x = torch.randn(40, 512, dtype=torch.bfloat16, device=DEVICE)
    tile = {**TILE, "splits": 4, "unpack": "sums"}
    assert torch.equal(fused(x, weight, tile)[16:23], fused(x[16:23], weight, tile))


@pytest.mark.parametrize("k", [64, 320, 448])
def test_columns_that_no_tile_divides(k: int) -> None:
    weight, exact = packed((16, k), AFFINE4, torch.float16)
    x = torch.randn(16, k, dtype=torch.float16, device=DEVICE)
    check(fused(x, weight, {**TILE, "block_k": 256, "unpack": "plain"}), x, exact, rounded=True)


@pytest.mark.parametrize("method", ["fused", "blas"])
def test_bias_and_residual_of_any_strides(method: str) -> None:
    weight, exact = packed((300, 128), AFFINE4, torch.float32, pairs=False)
    x = torch.randn(128, 20, device=DEVICE).T
    bias, residual = torch.randn(300, device=DEVICE), torch.randn(300, 20, device=DEVICE).T
    if method == "fused":
        y = fused(x, weight, {**TILE, "unpack": "plain"}, bias=bias, residual=residual)
    else:
        y = by_blas(x, weight, 128, bias=bias, residual=residual)
    check(y, x, exact, bias.double() + residual.double(), rounded=True)


def test_wide_as_dispatched() -> None:
    weight, exact = packed((70, 192), AFFINE4, torch.float16)
    x = torch.randn(5, 80, 192, dtype=torch.float16, device=DEVICE)[2]
    check(wide(x, weight), x, exact, rounded=True)


def test_no_rows() -> None:
    weight, _ = packed((70, 192), AFFINE4, torch.float16)
    assert wide(torch.empty(0, 192, dtype=torch.float16, device=DEVICE), weight).shape == (0, 70)


def test_bad_input() -> None:
    weight, _ = packed((70, 192), AFFINE4, torch.float32)
    x = torch.randn(3, 192, device=DEVICE)
    with pytest.raises(ValueError, match=r"x: must be \(M, 192\) for a weight \(70, 192\), got \(3, 191\)"):
        wide(x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"bias: must be \(70,\), got \(192,\)"):
        wide(x, weight, bias=x[0])
    with pytest.raises(ValueError, match=r"residual: must be \(3, 70\), got \(3, 192\)"):
        wide(x, weight, residual=x)
    with pytest.raises(ValueError, match=r"packed: must be one matrix, got words \(1, 70, 24\)"):
        wide(x, packed((1, 70, 192), AFFINE4, torch.float32)[0])
