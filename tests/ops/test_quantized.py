"""Codes, packing and products against MLX on the CPU, and against float64."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gfxlm.ops.formats import Quantization, pack_codes, unpack_codes
from gfxlm.ops.quantized import dequantize, gather_mm, gather_qmm, quantize, quantized_matmul
from gfxlm.weights.weight import PackedWeight
from tests.mlx_bridge import to_mlx, to_torch

AFFINE = list(itertools.product((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)))
FLOAT_MODES = ("mxfp4", "mxfp8", "nvfp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def awkward_weights(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows, and rows with what breaks quantisers: zeros, one sign, constants, an outlier, tiny numbers."""
    w = torch.randn(rows, columns) * 0.02
    w[0] = 0
    w[1] = w[1].abs()
    w[2] = -w[2].abs()
    w[3] = 0.37
    w[4, 5] = 40.0
    w[5] *= 1e-6
    w[6] = torch.linspace(-1, 1, columns)
    return w.to(dtype)


@given(
    bits=st.sampled_from((1, 2, 3, 4, 5, 6, 8)),
    rows=st.integers(1, 3),
    groups=st.integers(1, 5),
    data=st.data(),
)
def test_packing_is_an_lsb_first_bit_stream(bits: int, rows: int, groups: int, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, groups * 32), dtype=np.uint8)
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(rows, -1)
    expected = np.packbits(stream, axis=-1, bitorder="little").view(np.uint32)
    packed = pack_codes(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint32
    np.testing.assert_array_equal(packed.numpy(), expected)
    np.testing.assert_array_equal(unpack_codes(packed, bits).numpy(), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), AFFINE)
def test_affine_codes_equal_mlx(bits: int, group_size: int, dtype: torch.dtype) -> None:
    w = awkward_weights(64, 384, dtype)
    ours = quantize(w, group_size, bits)
    theirs = mx.quantize(to_mlx(w), group_size, bits)
    for mine, other in zip(ours, theirs, strict=True):
        if bits == 1:  # its bias is the smallest weight, which of a 0 and a -0 is either
            assert torch.equal(mine, to_torch(other))
        else:
            assert torch.equal(mine.view(torch.uint8), to_torch(other).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_float_codes_equal_mlx(mode: str, dtype: torch.dtype) -> None:
    w = awkward_weights(64, 384, dtype)
    ours = quantize(w, mode=mode)
    theirs = mx.quantize(to_mlx(w), mode=mode)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, to_torch(other))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["affine", *FLOAT_MODES])
def test_quantize_takes_a_transposed_matrix(mode: str) -> None:
    w = awkward_weights(64, 384, torch.bfloat16)
    for strided, contiguous in zip(quantize(w.T.contiguous().T, mode=mode), quantize(w, mode=mode), strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize(("bits", "group_size"), AFFINE)
def test_affine_dequantize_fp32(bits: int, group_size: int) -> None:
    triple = quantize(awkward_weights(64, 384, torch.float32), group_size, bits)
    ours = dequantize(*triple, group_size, bits)
    theirs = to_torch(mx.dequantize(*map(to_mlx, triple), group_size, bits))
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize(("bits", "group_size"), AFFINE)
def test_affine_dequantize_bf16_rounds_once(bits: int, group_size: int) -> None:
    w_q, scales, biases = quantize(awkward_weights(64, 384, torch.bfloat16), group_size, bits)
    codes = unpack_codes(w_q, bits).double().unflatten(-1, (-1, group_size))
    exact = (codes * scales.double()[..., None] + biases.double()[..., None]).flatten(-2)
    ours = dequantize(w_q, scales, biases, group_size, bits)
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_float_dequantize_equals_mlx(mode: str) -> None:
    w_q, scales = quantize(awkward_weights(64, 384, torch.float32), mode=mode)
    for dtype, theirs in ((torch.float32, mx.float32), (torch.bfloat16, mx.bfloat16)):
        ours = dequantize(w_q, scales, mode=mode, dtype=dtype)
        assert torch.equal(ours, to_torch(mx.dequantize(to_mlx(w_q), to_mlx(scales), mode=mode, dtype=theirs)))


def test_global_scale_round_trip() -> None:
    w = torch.randn(3, 16, 64)
    top = w.abs().amax((-1, -2))
    parts = [quantize(w[e], mode="nvfp4", global_scale=top[e]) for e in range(3)]
    w_q, scales = (torch.stack(part) for part in zip(*parts, strict=True))
    back = dequantize(w_q, scales, mode="nvfp4", global_scale=top, dtype=torch.float32)
    assert (back - w).norm() / w.norm() < 0.1
    x = torch.randn(3, 1, 64)
    y = gather_qmm(x, w_q, scales, rhs_indices=torch.tensor([2, 0, 1]), mode="nvfp4", global_scale=top)
    torch.testing.assert_close(y, x @ back[[2, 0, 1]].mT)


ALL_FORMATS = [Quantization(64, bits) for bits in (2, 3, 4, 5, 6, 8)] + [
    Quantization.resolve(mode=m) for m in FLOAT_MODES
]


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("q", ALL_FORMATS, ids=str)
def test_quantized_matmul(q: Quantization, transpose: bool) -> None:
    w = torch.randn(128, 128)
    triple = quantize(w, q.group_size, q.bits, q.mode)
    for shape in ((128,), (1, 128), (5, 128), (2, 3, 128)):
        x = torch.randn(*shape)
        biases = triple[2] if q.affine else None
        ours = quantized_matmul(x, triple[0], triple[1], biases, transpose, q.group_size, q.bits, q.mode)
        theirs = mx.quantized_matmul(
            to_mlx(x),
            *map(to_mlx, triple),
            transpose=transpose,
            group_size=q.group_size,
            bits=q.bits,
            mode=q.mode,
        )
        torch.testing.assert_close(ours, to_torch(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("q", ALL_FORMATS, ids=str)
def test_gather_qmm(q: Quantization) -> None:
    w = torch.randn(5, 64, 128)
    triple = quantize(w, q.group_size, q.bits, q.mode)
    x = torch.randn(2, 3, 1, 128)
    rhs = torch.tensor([[[0, 4], [2, 2], [1, 0]], [[3, 3], [4, 1], [0, 2]]])
    lhs = torch.arange(6).reshape(2, 3, 1)
    options = {"transpose": True, "group_size": q.group_size, "bits": q.bits, "mode": q.mode}
    ours = gather_qmm(x, *triple[:2], triple[2] if q.affine else None, lhs, rhs, **options)
    theirs = mx.gather_qmm(
        to_mlx(x),
        *map(to_mlx, triple),
        lhs_indices=mx.array(lhs.numpy()),
        rhs_indices=mx.array(rhs.numpy()),
        **options,
    )
    assert ours.shape == (2, 3, 2, 1, 64)
    torch.testing.assert_close(ours, to_torch(theirs), atol=1e-4, rtol=1e-4)


def test_gather_mm_default_and_strided_indices() -> None:
    a, b = torch.randn(4, 2, 32), torch.randn(4, 32, 16)
    torch.testing.assert_close(gather_mm(a, b), a @ b)
    indices = torch.tensor([[3, 9, 0], [1, 9, 2]])[:, ::2]
    torch.testing.assert_close(
        gather_mm(a, b, rhs_indices=indices[:, :1], lhs_indices=indices), a[indices] @ b[indices[:, :1]]
    )


def test_bf16_product_is_as_good_as_the_dequantised_weight() -> None:
    triple = quantize(torch.randn(256, 512).bfloat16())
    x = torch.randn(7, 512).bfloat16()
    exact = x.double() @ dequantize(*(t.double() if t.is_floating_point() else t for t in triple)).double().mT
    ours = quantized_matmul(x, *triple)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() / exact.norm() < 2**-8


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"bits": 7}, "bits"),
        ({"group_size": 48}, "group_size"),
        ({"mode": "int4"}, "mode"),
        ({"mode": "mxfp4", "bits": 8}, "bits"),
        ({"mode": "nvfp4", "group_size": 32}, "group_size"),
    ],
)
def test_formats_that_mlx_lacks(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=f"^{word}"):
        quantize(torch.randn(2, 128), **arguments)  # type: ignore[arg-type]


def test_wrong_shapes_are_named() -> None:
    w_q, scales, biases = quantize(torch.randn(64, 128))
    with pytest.raises(ValueError, match=r"x: last dimension 64 .* 128"):
        quantized_matmul(torch.randn(1, 64), w_q, scales, biases)
    with pytest.raises(ValueError, match="scales: shape"):
        dequantize(w_q, scales[:, :1], biases[:, :1])
    with pytest.raises(ValueError, match="biases: mode 'affine' needs them"):
        dequantize(w_q, scales)
    with pytest.raises(ValueError, match="scales, biases: must be floating"):
        dequantize(w_q, scales.int(), biases.int())
    with pytest.raises(ValueError, match="dtype: must be floating"):
        dequantize(w_q, scales, biases, dtype=torch.int32)
    with pytest.raises(ValueError, match="w: needs 2 dimensions"):
        quantize(torch.randn(2, 100))
    with pytest.raises(IndexError, match="rhs_indices"):
        gather_qmm(torch.randn(1, 1, 128), w_q[None], scales[None], biases[None], rhs_indices=torch.tensor([1]))


def test_nothing_in_nothing_out() -> None:
    w_q, scales, biases = quantize(torch.randn(0, 128))
    assert w_q.shape == (0, 16)
    assert dequantize(w_q, scales, biases).shape == (0, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_in_the_place_of_tensors(dtype: torch.dtype) -> None:
    w_q, scales, biases = quantize(torch.randn(5, 96, 128).to(dtype))
    stack = PackedWeight.from_mlx(w_q, scales, biases, Quantization(64, 4), dtype)
    x = torch.randn(3, 1, 128).to(dtype)
    indices = torch.tensor([[4, 0], [1, 1], [2, 4]])
    rows = torch.arange(3)[:, None]
    expected = gather_qmm(x, w_q, scales, biases, rows, indices)
    ours = gather_qmm(x, stack, lhs_indices=rows, rhs_indices=indices)
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.1)
    matrix = stack.matrix(2)
    torch.testing.assert_close(
        quantized_matmul(x, matrix), quantized_matmul(x, w_q[2], scales[2], biases[2]), rtol=0.02, atol=0.1
    )
    with pytest.raises(ValueError, match="scales: a packed w needs them"):
        quantized_matmul(x, w_q[0])
