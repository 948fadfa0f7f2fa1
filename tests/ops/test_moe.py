"""Routing and the experts' MLPs, against the sum written out in float64."""

import pytest
import torch

from gfxlm.ops import expert_mlp, ragged, route
from gfxlm.weights.weight import DenseWeight


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
