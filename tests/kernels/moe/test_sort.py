"""The counting sort by expert: a permutation in stable order, and tiles that cover it exactly once."""

import pytest
import torch

from gfxlm.kernels.moe.sort import moe_sort

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("tokens", "k", "num_experts", "block", "low", "high"),
    [
        (1, 1, 8, 16, 0, 8),
        (7, 3, 8, 16, 0, 8),
        (300, 2, 5, 16, 0, 5),
        (100, 10, 512, 16, 0, 512),
        (200, 2, 700, 16, 0, 700),
        (64, 8, 128, 32, -2, 131),
        (30, 4, 16, 16, 20, 40),
        (300, 1, 1, 64, 0, 1),
        (150, 2, 6, 16, 3, 4),
    ],
    ids=[
        "one row",
        "few",
        "ragged",
        "512 experts",
        "700 experts",
        "out of range",
        "none in range",
        "one",
        "one of six",
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sort(tokens: int, k: int, num_experts: int, block: int, low: int, high: int, dtype: torch.dtype) -> None:
    experts = torch.randint(low, high, (tokens, k), dtype=dtype, device=DEVICE)
    layout = moe_sort(experts, num_experts, block)
    given = experts.flatten().cpu()
    known = (given >= 0) & (given < num_experts)
    sort_by = torch.where(known, given, num_experts - 1)
    expected = sort_by.argsort(stable=True)
    order = layout.order.cpu().long()
    assert torch.equal(torch.where(order < 0, ~order, order), expected)
    assert torch.equal(order >= 0, known[expected])
    covered: list[int] = []
    for expert, first, end in layout.tiles.T.tolist():
        if expert >= 0:
            rows = range(first, min(first + block, end))
            assert (sort_by[expected[first:end]] == expert).all()
            covered += rows
    assert covered == list(range(tokens * k))


def test_no_rows() -> None:
    layout = moe_sort(torch.zeros(0, 4, dtype=torch.int64, device=DEVICE), 8, 16)
    assert layout.order.shape == (0,)
    assert layout.tiles.shape == (3, 0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"experts: must be int32 or int64, got torch.float32"):
        moe_sort(torch.zeros(2, 2, device=DEVICE), 8, 16)
