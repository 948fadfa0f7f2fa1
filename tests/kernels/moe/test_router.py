"""The router kernel against softmax and a stable sort in float64."""

import pytest
import torch
from torch import Tensor

from gfxlm.kernels.moe.router import route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def best(logits: Tensor, top_k: int) -> Tensor:
    return logits.sort(descending=True, stable=True).indices[:, :top_k]


def routed(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    experts, scores = route(logits.to(DEVICE), top_k, normalize)
    assert experts.dtype == torch.int64
    assert scores.dtype == torch.float32
    return experts.cpu(), scores.cpu()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 2), (60, 4), (60, 60), (128, 8), (513, 10)])
def test_against_float64(experts: int, top_k: int, dtype: torch.dtype, normalize: bool) -> None:
    logits = (torch.randn(3, experts) * 3).to(dtype)
    chosen, scores = routed(logits, top_k, normalize)
    assert torch.equal(chosen, best(logits, top_k))
    exact = logits.double().softmax(-1).gather(1, chosen)
    if normalize:
        exact /= exact.sum(-1, keepdim=True)
    # fp32's rounding of the exponent's argument, the exponential, the sum and the quotient.
    torch.testing.assert_close(scores.double(), exact, rtol=4e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_go_to_the_lowest_index(dtype: torch.dtype) -> None:
    logits = torch.randint(-2, 3, (16, 40)).to(dtype)
    logits[0] = 0.0
    logits[1, ::2] = -0.0
    logits[2] = -7.5
    assert torch.equal(routed(logits, 6, True)[0], best(logits, 6))


def test_rows_of_a_wider_matrix_and_columns_of_a_transposed_one() -> None:
    wide = torch.randn(5, 33).to(DEVICE)
    for logits in (wide[:, :32], wide[:, 1:], wide.mT.contiguous().mT):
        assert torch.equal(routed(logits, 3, True)[0], best(logits.cpu(), 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_not_finite_logits_choose_experts_that_exist(bad: float, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 20).to(dtype)
    logits[0], logits[1, 3], logits[2, :18] = bad, bad, bad
    chosen, scores = routed(logits, 5, True)
    assert all(len(set(row)) == 5 and set(row) <= set(range(20)) for row in chosen.tolist())
    assert torch.equal(chosen[1:2], best(logits[1:2], 5))
    assert scores[0].isnan().all()


def test_padding_has_no_experts() -> None:
    logits, slots = torch.randn(4, 20), torch.tensor([3, -1, 0, -1, 5])[:4]
    experts, _ = route(logits.to(DEVICE), 3, True, slots.to(DEVICE))
    expected = best(logits, 3)
    expected[[1, 3]] = -1
    assert torch.equal(experts.cpu(), expected)


def test_no_tokens() -> None:
    experts, scores = routed(torch.empty(0, 8), 2, True)
    assert experts.shape == scores.shape == (0, 2)
