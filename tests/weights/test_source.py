"""Handing out weights: checked, cast, merged where formats agree, and every tensor accounted for."""

import itertools

import pytest
import torch
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.ops.quantized import dequantize, quantize
from gfxlm.weights.config import QuantizationMap
from gfxlm.weights.safetensors_file import LazyTensor
from gfxlm.weights.source import WeightSource, main_dtype
from gfxlm.weights.weight import DenseWeight, MergedWeight, PackedWeight

COLUMNS = 128


def lazy(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


def source(
    tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, device: str = "cpu", **quantization: object
) -> WeightSource:
    parsed = QuantizationMap.parse({"quantization": quantization})
    return WeightSource(lazy(tensors), parsed, dtype=dtype, device=torch.device(device))


def quantized(path: str, shape: tuple[int, ...], bits: int = 4, mode: str = "affine") -> dict[str, Tensor]:
    parts = quantize(torch.randn(shape), None, bits, mode)
    return {f"{path}.{name}": part for name, part in zip(("weight", "scales", "biases"), parts, strict=False)}


def dense(tensors: dict[str, Tensor], path: str, bits: int = 4, mode: str = "affine") -> Tensor:
    w, scales, biases = (tensors.get(f"{path}.{name}") for name in ("weight", "scales", "biases"))
    assert w is not None
    assert scales is not None
    return dequantize(w, scales, biases, None, bits, mode, dtype=torch.float32)


def test_tensor_is_cast() -> None:
    stored = torch.randn(4, dtype=torch.float64)
    taken = source({"norm.weight": stored}, torch.bfloat16)
    assert torch.equal(taken.tensor("norm.weight", (4,)), stored.bfloat16())
    assert torch.equal(taken.tensor("norm.weight", (4,), torch.float32), stored.float())
    assert "norm.weight" in taken
    assert "norm.bias" not in taken


def test_tensor_that_is_missing_or_misshapen() -> None:
    taken = source({"norm.weight": torch.randn(4)})
    with pytest.raises(UserError, match=r"^norm\.bias: missing in the checkpoint$"):
        taken.tensor("norm.bias", (4,))
    with pytest.raises(UserError, match=r"^norm\.weight: shape \(4,\) contradicts the config, which makes it \(8,\)$"):
        taken.tensor("norm.weight", (8,))


@pytest.mark.parametrize("dtype", [torch.uint32, torch.int8, torch.int64, torch.bool, torch.uint8])
def test_integers_are_no_weights(dtype: torch.dtype) -> None:
    taken = source({"up.weight": torch.zeros(4, 4).to(dtype)})
    with pytest.raises(UserError, match=rf"^up\.weight: .*{dtype}"):
        taken.matrix(["up"], [4], 4)


def test_dense_matrices_are_merged() -> None:
    tensors = {"q.weight": torch.randn(6, 8), "k.weight": torch.randn(2, 8), "v.weight": torch.randn(2, 8)}
    weight = source(tensors).matrix(["q", "k", "v"], [6, 2, 2], 8)
    assert isinstance(weight, DenseWeight)
    assert torch.equal(weight.tensor, torch.cat(list(tensors.values())))


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize(("bits", "mode"), [(2, "affine"), (3, "affine"), (4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_matrices_of_one_format_are_merged(bits: int, mode: str, stack: tuple[int, ...]) -> None:
    tensors = quantized("gate", (*stack, 64, COLUMNS), bits, mode) | quantized("up", (*stack, 32, COLUMNS), bits, mode)
    for dtype in (torch.float32, torch.bfloat16):
        weight = source(tensors, dtype).matrix(["gate", "up"], [64, 32], COLUMNS, stack[0] if stack else None)
        assert isinstance(weight, PackedWeight)
        assert weight.shape == (*stack, 96, COLUMNS)
        both = torch.cat([dense(tensors, path, bits, mode) for path in ("gate", "up")], dim=-2)
        # bfloat16 scales and biases, and a bfloat16 weight: three roundings at most.
        assert ((weight.dequantize().float() - both).abs() <= 3 * 2**-8 * both.abs().max()).all()
        if dtype == torch.float32:
            assert torch.equal(weight.dequantize(), both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_of_different_formats_stay_apart(dtype: torch.dtype) -> None:
    tensors = quantized("q", (64, COLUMNS)) | quantized("k", (64, COLUMNS)) | quantized("v", (64, COLUMNS), bits=6)
    merged = source(tensors, dtype).matrix(["q", "k", "v"], [64, 64, 64], COLUMNS)
    assert isinstance(merged, MergedWeight)
    assert merged.shape == (192, COLUMNS)
    x = torch.randn(5, COLUMNS).to(dtype)
    alone = [source(tensors, dtype).matrix([path], [64], COLUMNS).matmul(x) for path in ("q", "k", "v")]
    assert torch.equal(merged.matmul(x), torch.cat(alone, -1))


def test_quantised_beside_dense() -> None:
    tensors = quantized("gate", (64, COLUMNS)) | {"up.weight": torch.randn(64, COLUMNS)}
    merged = source(tensors, gate={"bits": 4}, up=False).matrix(["gate", "up"], [64, 64], COLUMNS)
    assert isinstance(merged, MergedWeight)
    x = torch.randn(5, COLUMNS)
    both = torch.cat([dense(tensors, "gate"), tensors["up.weight"]])
    assert torch.allclose(merged.matmul(x), x @ both.mT, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up.weight": None}, r"up\.weight: missing"),
        ({"up.scales": None}, r"up\.weight: shape \(64, 16\) contradicts the config, which makes it \(64, 128\)"),
        ({"up.biases": None}, r"up\.biases: missing"),
        ({"up.weight": torch.zeros(65, 16).to(torch.uint32)}, r"up\.weight: shape \(65, 16\) .* \(64, 16\)"),
        ({"up.scales": torch.zeros(65, 2)}, r"up\.scales: shape \(65, 2\) .* \(64, 2\)"),
        ({"up.biases": torch.zeros(64, 4)}, r"up\.biases: shape \(64, 4\) .* \(64, 2\)"),
        ({"up.scales": torch.zeros(64, 3)}, r"up: 128 inputs in 16 words with 3 scales"),
        ({"up.scales": torch.zeros(())}, r"up: .*128 inputs in 16 words with 0 scales"),
        ({"up.weight": torch.zeros((), dtype=torch.int32)}, r"up: 128 inputs in 0 words with 2 scales"),
        ({"up.weight": torch.zeros(64, 16, dtype=torch.int32)}, r"up\.weight: .*torch\.int32"),
        ({"up.weight": torch.zeros(64, 16)}, r"up\.weight: .*torch\.float32"),
        ({"up.scales": torch.zeros(64, 2, dtype=torch.int32)}, r"up\.scales: .*torch\.int32"),
        ({"up.biases": torch.zeros(64, 2, dtype=torch.uint8)}, r"up\.biases: .*torch\.uint8"),
        ({"up.global_scale": torch.ones(())}, r"up\.global_scale: .*not supported"),
    ],
)
def test_damaged_triples(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {k: t for k, t in (quantized("up", (64, COLUMNS)) | change).items() if t is not None}
    with pytest.raises(UserError, match=f"^{message}"):
        source(tensors).matrix(["up"], [64], COLUMNS)


def test_float_modes_have_bytes_for_scales() -> None:
    tensors = quantized("up", (64, COLUMNS), 4, "mxfp4")
    tensors["up.scales"] = tensors["up.scales"].int()
    with pytest.raises(UserError, match=r"^up"):
        source(tensors, up={"mode": "mxfp4"}).matrix(["up"], [64], COLUMNS)


def test_books() -> None:
    tensors = quantized("up", (64, COLUMNS)) | {
        "norm.weight": torch.ones(4),
        "extra": torch.ones(2),
        "more": torch.ones(1),
    }
    read: list[int] = []
    taken = WeightSource(
        lazy(tensors),
        QuantizationMap.parse({}),
        dtype=torch.float32,
        device=torch.device("cpu"),
        progress=read.append,
    )
    assert taken.untouched() == sorted(tensors)
    taken.matrix(["up"], [64], COLUMNS)
    taken.tensor("norm.weight", (4,))
    assert sum(read) == sum(tensors[n].nbytes for n in ("up.weight", "up.scales", "up.biases", "norm.weight"))
    assert taken.untouched() == ["extra", "more"]


def test_everything_goes_to_the_device() -> None:
    tensors = quantized("q", (64, COLUMNS)) | quantized("k", (64, COLUMNS)) | {"norm.weight": torch.ones(4)}
    taken = source(tensors, torch.bfloat16, device="meta")
    weight = taken.matrix(["q", "k"], [64, 64], COLUMNS)
    assert isinstance(weight, PackedWeight)
    assert {t.device.type for t in weight.to_mlx() if t is not None} == {"meta"}
    assert taken.tensor("norm.weight", (4,)).device.type == "meta"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_main_dtype_is_the_one_with_most_bytes(order: tuple[int, ...]) -> None:
    tensors = [
        ("few large numbers", torch.zeros(10, dtype=torch.float32)),
        ("many small ones", torch.zeros(30, dtype=torch.float16)),
        ("codes", torch.zeros(1000, dtype=torch.int32).view(torch.uint32)),
    ]
    assert main_dtype(lazy(dict(tensors[i] for i in order))) == torch.float16


def test_main_dtype_where_nothing_floats() -> None:
    assert main_dtype(lazy({"codes": torch.zeros(4, dtype=torch.uint8)})) == torch.bfloat16
    assert main_dtype({}) == torch.bfloat16
