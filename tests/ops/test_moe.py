"""Routing and the experts' MLPs, against the sum written out in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gfxlm.device.arch import named
from gfxlm.kernels.launch import recording
from gfxlm.ops import expert_mlp, ragged, route
from gfxlm.ops.formats import Quantization
from gfxlm.ops.moe import SharedExpert
from gfxlm.weights.weight import DenseWeight, MergedWeight, PackedWeight, Weight


@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (7, 3), (64, 10)])
def test_expert_mlp(tokens: int, experts: int, top_k: int) -> None:
    x = torch.randn(tokens, 32)
    gate_up, down = torch.randn(experts, 96, 32), torch.randn(experts, 32, 48)
    chosen, scores = route(torch.randn(tokens, experts), top_k, normalize=True)
    y = expert_mlp(x, chosen, scores, DenseWeight(gate_up), DenseWeight(down))
    gate, up = torch.einsum("td,tkfd->tkf", x.double(), gate_up.double()[chosen]).chunk(2, dim=-1)
    each = torch.einsum("tkf,tkdf->tkd", torch.nn.functional.silu(gate) * up, down.double()[chosen])
    torch.testing.assert_close(y.double(), (each * scores[..., None]).sum(1), rtol=1e-4, atol=1e-4)


def test_company_changes_nothing() -> None:
    x, weights = torch.randn(5, 32), (DenseWeight(torch.randn(8, 64, 32)), DenseWeight(torch.randn(8, 32, 32)))
    chosen, scores = route(torch.randn(5, 8), 2, normalize=False)
    together = expert_mlp(x, chosen, scores, *weights)
    alone = torch.cat([expert_mlp(x[t : t + 1], chosen[t : t + 1], scores[t : t + 1], *weights) for t in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_route_is_softmax_over_all(normalize: bool) -> None:
    logits = torch.randn(6, 20).bfloat16()
    experts, scores = route(logits, 4, normalize=normalize)
    probabilities = torch.softmax(logits.double(), -1)
    best = probabilities.sort(descending=True).values[:, :4]
    expected = best / best.sum(-1, keepdim=True) if normalize else best
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(probabilities.gather(1, experts), best)
    assert scores.dtype == torch.float32


def test_empty_batch_has_integer_positions() -> None:
    positions, slots = ragged([], [], [])
    assert positions.dtype == slots.index.dtype == torch.int64


@pytest.mark.parametrize(
    ("logits", "top_k", "message"),
    [
        (torch.zeros(3), 1, r"logits: must be floating \(T, E\), got torch.float32 \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.int64), 1, "logits: must be floating"),
        (torch.zeros(3, 4), 0, "top_k: must be from 1 to the number of experts, 4, got 0"),
        (torch.zeros(3, 4), 5, "top_k: .* got 5"),
    ],
)
def test_route_says_what_is_wrong(logits: Tensor, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(logits, top_k, normalize=True)


def test_route_wants_a_slot_a_token() -> None:
    with pytest.raises(ValueError, match=r"slots: must be int64 \(3,\), got torch.int64 \(2,\)"):
        route(torch.zeros(3, 4), 1, normalize=True, slots=torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 32, 1)}, r"x: must be floating \(T, D\), got torch.float32 \(2, 32, 1\)"),
        ({"experts": torch.zeros(3, 2, dtype=torch.int64)}, r"experts: must be integers \(2, k\), got .*\(3, 2\)"),
        ({"experts": torch.zeros(2, 2)}, "experts: must be integers"),
        ({"scores": torch.zeros(2, 3)}, r"scores: must be floating \(2, 2\), got torch.float32 \(2, 3\)"),
        ({"gate_up": DenseWeight(torch.zeros(4, 96, 64))}, r"gate_up: must be \(E, 2 I, 32\), got \(4, 96, 64\)"),
        ({"down": DenseWeight(torch.zeros(4, 32, 47))}, r"down: must be \(4, 32, 48\), got \(4, 32, 47\)"),
        ({"residual": torch.zeros(2, 31)}, r"residual: must be torch.float32 \(2, 32\), got .*\(2, 31\)"),
        ({"residual": torch.zeros(2, 32).bfloat16()}, "residual: must be torch.float32"),
    ],
)
def test_expert_mlp_says_what_is_wrong(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 32),
        "experts": torch.zeros(2, 2, dtype=torch.int64),
        "scores": torch.zeros(2, 2),
        "gate_up": DenseWeight(torch.zeros(4, 96, 32)),
        "down": DenseWeight(torch.zeros(4, 32, 48)),
    }
    with pytest.raises(ValueError, match=message):
        expert_mlp(**arguments | changed)


def test_shared_expert_and_residual() -> None:
    x, residual = torch.randn(3, 32), torch.randn(3, 32)
    stacks = DenseWeight(torch.randn(4, 64, 32)), DenseWeight(torch.randn(4, 32, 32))
    shared = SharedExpert(DenseWeight(torch.randn(80, 32)), DenseWeight(torch.randn(32, 40)), torch.randn(3, 1))
    chosen = route(torch.randn(3, 4), 2, normalize=True)
    y = expert_mlp(x, *chosen, *stacks, shared=shared, residual=residual)
    gate, up = (x @ shared.gate_up.tensor.mT).chunk(2, dim=-1)
    added = shared.logits.sigmoid() * ((torch.nn.functional.silu(gate) * up) @ shared.down.tensor.mT)
    torch.testing.assert_close(y, residual + expert_mlp(x, *chosen, *stacks) + added)


def kernels(tokens: int, gate_up: Weight, down: Weight, shared: bool = False) -> list[str]:
    """The kernels of a block on an H200."""
    hidden = gate_up.shape[-1]

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    expert = SharedExpert(packed(2 * 64, hidden), packed(hidden, 64), empty(tokens, 1)) if shared else None
    with recording(named("sm_90")) as launches:
        experts, scores = route(empty(tokens, gate_up.shape[0]), 2, normalize=True)
        y = expert_mlp(empty(tokens, hidden), experts, scores, gate_up, down, shared=expert)
    assert y.shape == (tokens, hidden)
    return [launch.kernel.__name__ for launch in launches]


def packed(*shape: int, bits: int = 4) -> PackedWeight:
    *rows, columns = shape
    w = torch.empty(*rows, columns * bits // 32, dtype=torch.uint32, device="meta")
    scales = torch.empty(2, *rows, columns // 64, dtype=torch.bfloat16, device="meta")
    return PackedWeight.from_mlx(w, *scales, Quantization(64, bits), torch.bfloat16)


def dense(*shape: int) -> DenseWeight:
    return DenseWeight(torch.empty(shape, dtype=torch.bfloat16, device="meta"))


def test_what_a_gpu_runs() -> None:
    gate_up, down = packed(8, 256, 128), packed(8, 128, 128)
    decode = ["route_kernel", "gate_up_kernel", "down_kernel"]
    assert kernels(1, gate_up, down) == decode
    assert kernels(2, gate_up, down, shared=True) == decode
    assert kernels(1, gate_up, packed(8, 128, 128, bits=8)) == decode
    mixed = kernels(1, packed(8, 256, 128, bits=8), down, shared=True)
    assert mixed[-2:] == decode[1:]
    assert len(mixed) == 5  # the shared expert in two launches of its own
    merged = MergedWeight([packed(8, 128, 128), packed(8, 128, 128, bits=8)])
    for block in (
        kernels(1024, gate_up, down, shared=True),
        kernels(1, dense(8, 256, 128), dense(8, 128, 128)),
        kernels(1, merged, down),
    ):
        assert block[0] == "route_kernel"
        assert "grouped_kernel" in block
        assert not {*decode[1:]} & {*block}
