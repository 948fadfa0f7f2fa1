"""Sparse feed-forward blocks against the sum over experts as it is written down."""

import pytest
import torch
from torch import Tensor

from gfxlm.nn import mlp as mlp_module
from gfxlm.nn.mlp import GatedMLP, SparseMoE
from gfxlm.ops.moe import route
from gfxlm.ops.quantized import dequantize, quantize
from gfxlm.ops.ragged import Slots
from gfxlm.weights.config import QuantizationMap
from gfxlm.weights.safetensors_file import LazyTensor
from gfxlm.weights.source import WeightSource

HIDDEN, INNER, EXPERTS, TOP_K = 64, 96, 6, 2
SHAPES = {
    "gate": (EXPERTS, HIDDEN),
    "switch_mlp.gate_proj": (EXPERTS, INNER, HIDDEN),
    "switch_mlp.up_proj": (EXPERTS, INNER, HIDDEN),
    "switch_mlp.down_proj": (EXPERTS, HIDDEN, INNER),
    "shared_expert.gate_proj": (32, HIDDEN),
    "shared_expert.up_proj": (32, HIDDEN),
    "shared_expert.down_proj": (HIDDEN, 32),
    "shared_expert_gate": (1, HIDDEN),
}


def load(module: GatedMLP | SparseMoE, shapes: dict[str, tuple[int, ...]], bits: dict[str, int]) -> dict[str, Tensor]:
    """Give the module random weights, quantised to `bits`; returns the dense ones in float64."""
    tensors: dict[str, Tensor] = {}
    dense = {}
    for path, shape in shapes.items():
        w = torch.randn(shape) * shape[-1] ** -0.5
        tensors[f"mlp.{path}.weight"] = w
        if path in bits:
            w_q, scales, biases = quantize(w, 32, bits[path])
            tensors |= {f"mlp.{path}.weight": w_q, f"mlp.{path}.scales": scales, f"mlp.{path}.biases": biases}
            w = dequantize(w_q, scales, biases, 32, bits[path])
        dense[path] = w.double()
    lazy = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    source = WeightSource(lazy, QuantizationMap({}), dtype=torch.float32, device=torch.device("cpu"))
    module.load(source, "mlp")
    assert source.untouched() == []
    return dense


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (torch.nn.functional.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT


def expected(x: Tensor, w: dict[str, Tensor], normalize: bool) -> Tensor:
    x = x.double()
    out = torch.zeros_like(x)
    for row, scores in enumerate((x @ w["gate"].mT).softmax(-1)):
        best = scores.argsort(descending=True)[:TOP_K]
        total = scores[best].sum() if normalize else 1
        for e in best:
            matrices = (w[f"switch_mlp.{name}_proj"][e] for name in ("gate", "up", "down"))
            out[row] += scores[e] / total * gated(x[row], *matrices)
    if "shared_expert_gate" in w:
        shared = gated(x, *(w[f"shared_expert.{name}_proj"] for name in ("gate", "up", "down")))
        out += torch.sigmoid(x @ w["shared_expert_gate"].mT) * shared
    return out


EXPERT_BITS = {f"switch_mlp.{name}_proj": 4 for name in ("gate", "up", "down")}


@pytest.mark.parametrize("bits", [{}, EXPERT_BITS, EXPERT_BITS | {"switch_mlp.up_proj": 6, "gate": 8}], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_sparse_block(normalize: bool, shared: bool, bits: dict[str, int]) -> None:
    block = SparseMoE(
        HIDDEN, INNER, EXPERTS, TOP_K, normalize=normalize, shared_intermediate_size=32 if shared else None
    )
    shapes = {path: shape for path, shape in SHAPES.items() if shared or "shared" not in path}
    w = load(block, shapes, bits)
    assert dict(block.matrices("")) == shapes
    x = torch.randn(17, HIDDEN)
    assert (block(x).double() - expected(x, w, normalize)).abs().max() < 1e-5


def test_company_does_not_change_a_token_of_a_sparse_block() -> None:
    block = SparseMoE(HIDDEN, INNER, EXPERTS, TOP_K, normalize=True)
    load(block, {path: shape for path, shape in SHAPES.items() if "shared" not in path}, EXPERT_BITS)
    x = torch.randn(9, HIDDEN)
    together = block(x)
    for row in range(9):
        assert torch.allclose(block(x[row : row + 1])[0], together[row], atol=1e-6)


def test_the_router_is_told_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    block = SparseMoE(HIDDEN, INNER, EXPERTS, TOP_K, normalize=True)
    load(block, {path: shape for path, shape in SHAPES.items() if "shared" not in path}, EXPERT_BITS)
    told = []

    def spy(logits: Tensor, top_k: int, *, normalize: bool, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        told.append(slots)
        return route(logits, top_k, normalize=normalize, slots=slots)

    monkeypatch.setattr(mlp_module, "route", spy)
    index = torch.tensor([0, 4, -1])
    block(torch.randn(3, HIDDEN), None, Slots(index, ()))
    assert told == [index]


def test_gated_mlp() -> None:
    mlp = GatedMLP(HIDDEN, INNER)
    w = load(mlp, {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}, {})
    x = torch.randn(3, HIDDEN)
    assert (mlp(x).double() - gated(x.double(), *w.values())).abs().max() < 1e-5
