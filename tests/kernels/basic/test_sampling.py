"""Sampling on the GPU chooses what the sampler chooses on the CPU."""

import math

import pytest
import torch
from torch import Tensor

from gfxlm.engine.params import SamplingParams
from gfxlm.engine.sampler import Sampler
from gfxlm.kernels.basic.filters import draw_filtered
from gfxlm.kernels.basic.sampling import draw
from gfxlm.kernels.basic.select import select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sampler_of(params: list[SamplingParams], vocab: int) -> Sampler:
    """A slot for each, and one that makes the sampler sort whole rows: it then keeps equals, however many."""
    sampler = Sampler(len(params) + 1, vocab)
    for slot, wanted in enumerate([*params, SamplingParams(temperature=1.0, min_p=0.5)]):
        sampler.set(slot, wanted)
    return sampler


def on_device(sampler: Sampler, logits: Tensor, slots: Tensor, positions: Tensor, *, filtered: bool) -> Tensor:
    kernel = draw_filtered if filtered else draw
    tables = (sampler._fp32.to(DEVICE), sampler._int64.to(DEVICE))
    return kernel(logits.to(DEVICE), *tables, slots.to(DEVICE), positions.to(DEVICE)).cpu()


def both(params: list[SamplingParams], logits: Tensor, *, filtered: bool = True) -> tuple[Tensor, Tensor]:
    """Tokens by the kernels and by the sampler in torch, slot i being row i's."""
    sampler = sampler_of(params, logits.shape[1])
    slots, positions = torch.arange(len(params)), torch.arange(len(params)) * 7 + 3
    return on_device(sampler, logits, slots, positions, filtered=filtered), sampler.sample(logits, slots, positions)[0]


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(1, torch.bfloat16), (700, torch.float16), (1024, torch.bfloat16), (2500, torch.float32)]
)
def test_greedy(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(6, vocab).to(dtype)
    logits[0, vocab // 2 :] = 9.0  # equals: the first wins
    logits[1, -1] = math.nan
    logits[2] = -math.inf
    logits[3, 0] = math.inf
    logits[4, : vocab // 2] = -math.inf
    expected = [vocab // 2, -1, -1, -1, int(logits[4].argmax()), int(logits[5].argmax())]
    assert select(logits.to(DEVICE), finite=True).tolist() == expected
    # A greedy slot among others' draws.
    params = [SamplingParams(top_k=3, top_p=0.5, seed=1)] * 6
    for filtered in (False, True):
        assert both(params, logits, filtered=filtered)[0].tolist() == expected


@pytest.mark.parametrize(
    ("temperature", "dtype"), [(1e-6, torch.float32), (0.3, torch.bfloat16), (1.0, torch.float16), (5.0, torch.float32)]
)
def test_plain_draws_are_the_samplers(temperature: float, dtype: torch.dtype) -> None:
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in (0, 1, -5, 2**64 - 1)]
    logits = (3 * torch.randn(4, 1500)).to(dtype)
    for filtered in (False, True):
        ours, expected = both(params, logits, filtered=filtered)
        assert ours.tolist() == expected.tolist()


FILTERS = {
    "top_k 1": {"top_k": 1},
    "top_k": {"top_k": 20},
    "top_k of most": {"top_k": 1800},
    "top_k of more": {"top_k": 10**6},
    "top_p": {"top_p": 0.9},
    "top_p of little": {"top_p": 1e-4},
    "top_p of nearly all": {"top_p": 0.9999},
    "min_p": {"min_p": 0.05},
    "min_p 1": {"min_p": 1.0},
    "min_p and some": {"min_p": 0.9, "min_tokens_to_keep": 30},
    "all": {"top_k": 40, "top_p": 0.8, "min_p": 0.01, "min_tokens_to_keep": 2},
    "none": {},
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_filtered_draws_are_the_samplers(filters: dict[str, float]) -> None:
    params = [SamplingParams(temperature=1.5, seed=seed, **filters) for seed in range(3)]
    logits = torch.tensor([[0.05], [1.0], [6.0]]) * torch.randn(3, 2100) + 5
    logits[0] = logits[0].bfloat16().float()  # many equals
    logits[1, 100:] = -math.inf
    ours, expected = both(params, logits)
    assert ours.tolist() == expected.tolist()


def kept_by_kernels(logits: Tensor, **filters: float) -> set[int]:
    """Which tokens of logits (V,) are drawn at one position or another."""
    sampler = sampler_of([SamplingParams(temperature=50.0, seed=3, **filters)], len(logits))
    n = 20
    zeros = torch.zeros(n, dtype=torch.int64)
    return set(on_device(sampler, logits.expand(n, -1), zeros, torch.arange(n), filtered=True).tolist())


def test_equals_at_the_threshold_stay_together() -> None:
    logits = torch.tensor([0.4, 0.2, 0.2, 0.1]).log()
    assert kept_by_kernels(logits, top_k=2) == {0, 1, 2}
    assert kept_by_kernels(logits, top_p=0.5) == {0, 1, 2}
    assert kept_by_kernels(torch.tensor([1.0, 1.0, -math.inf]), top_k=3, top_p=0.1) == {0, 1}


def test_rows_of_every_kind_share_a_launch() -> None:
    kinds = [*FILTERS.values()]
    params = [SamplingParams(temperature=0.8, seed=i, **filters) for i, filters in enumerate(kinds)]
    logits = 4 * torch.randn(len(params) + 3, 1000)
    params += [SamplingParams(temperature=1.0, top_p=0.5)] * 2 + [SamplingParams()]
    logits[-3, 7] = math.nan
    logits[-2] = -math.inf
    ours, expected = both(params, logits)
    assert ours.tolist() == expected.tolist()
    assert ours[-3:-1].tolist() == [-1, -1]


def test_padded_rows_and_no_rows() -> None:
    wide = torch.randn(3, 1100)
    params = [SamplingParams(temperature=1.0, top_k=5, seed=1)] * 3
    sampler = sampler_of(params, 1000)
    slots, positions = torch.tensor([2, 0, 1]), torch.tensor([4, 4, 2**40])
    expected = sampler.sample(wide[:, :1000], slots, positions)[0]
    wide[:, 1000:] = math.nan  # must not be read
    for filtered in (False, True):
        ours = on_device(sampler, wide[:, :1000], slots, positions, filtered=filtered)
        assert filtered is False or ours.tolist() == expected.tolist()
        assert (ours >= 0).all()
        assert on_device(sampler, wide[:0, :1000], slots[:0], positions[:0], filtered=filtered).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("vocab", [151_936, 248_320])
def test_real_vocabularies(vocab: int, spread: float) -> None:
    kinds = [*FILTERS.values()] * 2
    params = [SamplingParams(temperature=0.7, seed=i, **filters) for i, filters in enumerate(kinds)]
    for dtype in (torch.bfloat16, torch.float32):
        logits = (spread * torch.randn(len(params), vocab)).to(dtype)
        ours, expected = both(params, logits)
        again, _ = both(params, logits)
        assert torch.equal(ours, again)
        # A sum or a score within rounding of another may decide otherwise.
        assert (ours == expected).sum() >= len(params) - 1
