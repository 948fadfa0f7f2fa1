"""Weights in every format and layout: what goes in comes out bit for bit, and products are right."""

import itertools

import mlx.core as mx
import pytest
import torch
from torch import Tensor

from gfxlm.ops.formats import Quantization
from gfxlm.ops.int4_cpu import int4_applies
from gfxlm.ops.quantized import dequantize, quantize
from gfxlm.weights.weight import DenseWeight, MergedWeight, PackedWeight, Weight
from tests.mlx_bridge import to_mlx, to_torch

AFFINE = [Quantization(g, b) for b, g in itertools.product((1, 2, 3, 4, 5, 6, 8), (32, 64, 128))]
FLOAT_MODES = [Quantization(32, 4, "mxfp4"), Quantization(32, 8, "mxfp8"), Quantization(16, 4, "nvfp4")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FAST = int4_applies(64, torch.bfloat16)
ROWS, COLUMNS = 128, 256
# The int4 kernel takes whole blocks of rows, which 40 are not.
SHAPES = [(ROWS, COLUMNS), (40, COLUMNS), (3, ROWS, COLUMNS)]


def name(q: Quantization) -> str:
    return f"{q.mode}-{q.bits}bit-{q.group_size}"


def mlx_triple(shape: tuple[int, ...], q: Quantization, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """A random matrix as MLX quantises it, with a group of zeros and one that is far from zero."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    w[..., 1, :128], w[..., 2, :] = 0, w[..., 2, :] + 20
    parts = [to_torch(part) for part in mx.quantize(to_mlx(w.to(dtype)), q.group_size, q.bits, q.mode)]
    return parts[0], parts[1], parts[2] if q.affine else None


def pack(shape: tuple[int, ...], q: Quantization, dtype: torch.dtype) -> PackedWeight:
    return PackedWeight.from_mlx(*mlx_triple(shape, q, dtype), q, dtype)


def dense(shape: tuple[int, ...], q: Quantization, dtype: torch.dtype, out: torch.dtype | None = None) -> Tensor:
    w, scales, biases = mlx_triple(shape, q, dtype)
    return dequantize(w, scales, biases, q.group_size, q.bits, q.mode, dtype=out or dtype)


def is_int4(weight: PackedWeight) -> bool:
    return not isinstance(weight._layout, tuple)


formats = pytest.mark.parametrize("q", AFFINE + FLOAT_MODES, ids=name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@formats
def test_to_mlx_gives_back_every_bit(q: Quantization, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = pack(shape, q, dtype)
        assert is_int4(weight) == (FAST and q.affine and dtype == torch.bfloat16)
        assert weight.shape == shape
        for ours, theirs in zip(weight.to_mlx(), mlx_triple(shape, q, dtype), strict=True):
            if ours is None or theirs is None:
                assert ours is theirs
            else:
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@dtypes
@formats
def test_dequantize_and_rows(q: Quantization, dtype: torch.dtype) -> None:
    indices = torch.tensor([[0, 1, 2], [39, 2, 7]])
    for shape in SHAPES[:2]:
        weight, expected = pack(shape, q, dtype), dense(shape, q, dtype)
        assert weight.dequantize().dtype == dtype
        assert torch.equal(weight.dequantize(), expected)
        assert torch.equal(weight.rows(indices), expected[indices])
        assert torch.equal(weight.rows(indices[0, 1]), expected[1])


@dtypes
@formats
def test_matmul_against_float64(q: Quantization, dtype: torch.dtype) -> None:
    for shape in SHAPES[:2]:
        weight, matrix = pack(shape, q, dtype), dense(shape, q, dtype, torch.float64)
        for batch in ((1,), (5,), (2, 3), (400,)):
            x = torch.randn(*batch, COLUMNS).to(dtype)
            y, exact = weight.matmul(x), x.double() @ matrix.mT
            assert y.dtype == dtype
            # Rounding is relative to what is summed, not to the sum: once to the type, and a random walk in fp32.
            rounding = max(torch.finfo(dtype).eps, COLUMNS**0.5 / 2 * torch.finfo(torch.float32).eps)
            assert ((y.double() - exact).abs() / (x.double().abs() @ matrix.mT.abs())).nan_to_num().max() <= rounding


@dtypes
@formats
def test_matrix_of_a_stack(q: Quantization, dtype: torch.dtype) -> None:
    stack = pack(SHAPES[2], q, dtype)
    x = torch.randn(2, COLUMNS).to(dtype)
    for index in range(3):
        one = stack.matrix(index)
        w, scales, biases = (None if t is None else t[index] for t in mlx_triple(SHAPES[2], q, dtype))
        alone = PackedWeight.from_mlx(w, scales, biases, q, dtype)
        assert one.shape == alone.shape == (ROWS, COLUMNS)
        assert torch.equal(one.dequantize(), alone.dequantize())
        assert torch.equal(one.matmul(x), alone.matmul(x))


def storages(weight: Weight) -> dict[int, int]:
    """The memory that a weight holds on to: address and bytes of every storage behind it."""
    parts = vars(weight)["_layout"] if isinstance(weight, PackedWeight) else [vars(weight)["tensor"]]
    if not isinstance(parts, list | tuple):
        parts = [*parts.planes, *parts.scales_and_zeros, parts.biases]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts if t is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("q", [Quantization(64, 4), Quantization(64, 8), FLOAT_MODES[0]], ids=name)
def test_matrix_of_a_stack_is_no_copy(q: Quantization, dtype: torch.dtype) -> None:
    stack = pack(SHAPES[2], q, dtype)
    assert storages(stack.matrix(1)).keys() <= storages(stack).keys()
    dense_stack = DenseWeight(torch.randn(SHAPES[2]))
    assert storages(dense_stack.matrix(1)) == storages(dense_stack)


@dtypes
@formats
def test_nbytes_is_what_is_held(q: Quantization, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = pack(shape, q, dtype)
        assert weight.nbytes == sum(storages(weight).values())
        stored = sum(t.nbytes for t in mlx_triple(shape, q, dtype) if t is not None)
        if is_int4(weight):
            # A whole nibble (or two) for every code, three 2-byte numbers a group (or five) where MLX has two, and
            # rows of zeros that fill the last block.
            planes = 1 if q.bits <= 4 else 2
            elements = torch.Size(shape).numel() * (1 if shape[-2] == ROWS else 64 / 40)
            assert weight.nbytes == planes * elements / 2 + (2 * planes + 1) * 2 * elements / q.group_size
        else:
            assert weight.nbytes == stored


@pytest.mark.skipif(not FAST, reason="this CPU has no vectorised int4 kernel")
@pytest.mark.parametrize(("group_size", "overhead"), [(32, 22 / 20), (64, 38 / 36), (128, 70 / 68)])
def test_overhead_of_the_int4_layout_at_four_bits(group_size: int, overhead: float) -> None:
    q = Quantization(group_size, 4)
    stored = sum(t.nbytes for t in mlx_triple(SHAPES[0], q, torch.bfloat16) if t is not None)
    assert pack(SHAPES[0], q, torch.bfloat16).nbytes == pytest.approx(overhead * stored)


def test_scales_and_biases_take_the_dtype_that_is_asked_for() -> None:
    q = Quantization(64, 4)
    w, scales, biases = mlx_triple((40, COLUMNS), q, torch.float16)
    weight = PackedWeight.from_mlx(w, scales, biases, q, torch.float32)
    assert biases is not None
    assert torch.equal(weight.to_mlx()[1], scales.float())
    assert torch.equal(weight.dequantize(), dequantize(w, scales.float(), biases.float(), 64, 4))


def test_dense_weight() -> None:
    tensor = torch.randn(3, 5, 8)
    weight = DenseWeight(tensor)
    assert (weight.shape, weight.nbytes) == ((3, 5, 8), 480)
    one, x = weight.matrix(2), torch.randn(4, 8)
    assert torch.equal(one.matmul(x), torch.nn.functional.linear(x, tensor[2]))
    assert torch.equal(one.rows(torch.tensor([[4, 0]])), tensor[2][torch.tensor([[4, 0]])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merged_weight_of_mixed_formats(dtype: torch.dtype) -> None:
    kinds = [Quantization(64, 4), Quantization(32, 6), FLOAT_MODES[0]]
    for stack in ((), (3,)):
        parts: list[Weight] = [pack((*stack, 64, COLUMNS), q, dtype) for q in kinds]
        parts.append(DenseWeight(torch.randn(*stack, 8, COLUMNS).to(dtype)))
        merged = MergedWeight(parts)
        assert merged.shape == (*stack, 200, COLUMNS)
        assert merged.nbytes == sum(part.nbytes for part in parts)
        x = torch.randn(3, COLUMNS).to(dtype)
        if stack:
            merged, parts = merged.matrix(1), [part.matrix(1) for part in parts]
        assert merged.shape == (200, COLUMNS)
        assert torch.equal(merged.matmul(x), torch.cat([part.matmul(x) for part in parts], -1))
    with pytest.raises(NotImplementedError):
        merged.rows(torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("q", [Quantization(64, 4), Quantization(64, 8), *FLOAT_MODES], ids=name)
def test_an_empty_batch(q: Quantization, dtype: torch.dtype) -> None:
    packed = pack((ROWS, COLUMNS), q, dtype)
    plain = DenseWeight(torch.randn(ROWS, COLUMNS).to(dtype))
    for weight in (packed, plain, MergedWeight([packed, plain])):
        for batch in ((0,), (2, 0), (0, 2)):
            y = weight.matmul(torch.randn(*batch, COLUMNS).to(dtype))
            assert (y.shape, y.dtype) == ((*batch, weight.shape[0]), dtype)
    for weight in (packed, plain):
        rows = weight.rows(torch.zeros(2, 0, dtype=torch.int64))
        assert (rows.shape, rows.dtype) == ((2, 0, COLUMNS), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_a_stack_is_a_view(dtype: torch.dtype) -> None:
    stack = PackedWeight.from_mlx(*quantize(torch.randn(3, 64, 128).to(dtype)), Quantization(64, 4), dtype)
    held = {t.untyped_storage().data_ptr() for t in _tensors(stack)}
    assert {t.untyped_storage().data_ptr() for t in _tensors(stack.matrix(2))} == held


def _tensors(weight: PackedWeight) -> list[torch.Tensor]:
    layout = weight._layout
    if isinstance(layout, tuple):
        return [t for t in layout if t is not None]
    return [*layout.planes, *layout.scales_and_zeros, layout.biases]
