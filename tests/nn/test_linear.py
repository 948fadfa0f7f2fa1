"""Linear maps and embeddings over dense, quantised and mixed weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.nn.linear import Embedding, Linear, MergedLinear
from gfxlm.ops.quantized import dequantize, quantize
from gfxlm.weights.config import QuantizationMap
from gfxlm.weights.safetensors_file import LazyTensor
from gfxlm.weights.source import WeightSource

IN = 128


def source(tensors: dict[str, Tensor]) -> WeightSource:
    lazy = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    return WeightSource(lazy, QuantizationMap({}), dtype=torch.float32, device=torch.device("cpu"))


def stored(path: str, rows: int, bits: int | None = None, bias: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix as a checkpoint has it, and the dense matrix that it stands for."""
    w = torch.randn(rows, IN)
    tensors = {f"{path}.bias": torch.randn(rows)} if bias else {}
    if bits is None:
        return tensors | {f"{path}.weight": w}, w
    parts = quantize(w, 64, bits)
    named = dict(zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), parts, strict=True))
    return tensors | named, dequantize(*parts, 64, bits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4, 6])
def test_linear(bits: int | None, bias: bool) -> None:
    tensors, w = stored("model.o_proj", 40, bits, bias)
    linear = Linear(IN, 40, bias=bias)
    linear.load(taken := source(tensors), "model.o_proj")
    assert taken.untouched() == []
    assert dict(linear.matrices("model.o_proj")) == {"model.o_proj": (40, IN)}
    x = torch.randn(2, 3, IN)
    assert torch.allclose(linear(x), F.linear(x, w, tensors.get("model.o_proj.bias")), atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [(None, None, None), (4, 4, 4), (4, 4, 6), (4, None, 3)], ids=str)
def test_merged_linear(bits: tuple[int | None, ...], bias: bool) -> None:
    sizes = {"q_proj": 48, "k_proj": 16, "v_proj": 8}
    tensors: dict[str, Tensor] = {}
    dense = {}
    for (name, size), width in zip(sizes.items(), bits, strict=True):
        more, dense[name] = stored(f"layer.{name}", size, width, bias)
        tensors |= more
    merged = MergedLinear(IN, sizes, bias=bias)
    merged.load(taken := source(tensors), "layer.qkv_proj")
    assert taken.untouched() == []
    assert dict(merged.matrices("layer.qkv_proj")) == {f"layer.{name}": (size, IN) for name, size in sizes.items()}
    x = torch.randn(5, IN)
    for name, y in zip(sizes, merged(x), strict=True):
        assert torch.allclose(y, F.linear(x, dense[name], tensors.get(f"layer.{name}.bias")), atol=1e-4)


def test_bias_that_is_missing() -> None:
    tensors, _ = stored("up", 8)
    with pytest.raises(UserError, match=r"^up\.bias: missing"):
        Linear(IN, 8, bias=True).load(source(tensors), "up")
    with pytest.raises(UserError, match=r"^layer\.up\.bias: missing"):
        MergedLinear(IN, {"up": 8}, bias=True).load(source({"layer.up.weight": tensors["up.weight"]}), "layer.up_proj")


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_embedding(bits: int | None) -> None:
    tensors, w = stored("embed", 50, bits)
    embedding = Embedding(50, IN)
    embedding.load(source(tensors), "embed")
    tokens = torch.tensor([0, 49, 7, 7])
    assert torch.equal(embedding(tokens), w[tokens])
    x = torch.randn(3, IN)
    assert torch.allclose(embedding.as_linear(x), x @ w.mT, atol=1e-4)
    assert dict(embedding.matrices("embed")) == {"embed": (50, IN)}
