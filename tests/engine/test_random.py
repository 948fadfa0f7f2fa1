import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfxlm.engine.random import gumbel, splitmix64, uniform

MASK = 2**64 - 1
GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
INT64 = st.integers(-(2**63), 2**63 - 1)


def mix(word: int) -> int:
    """SplitMix64's mixing function in Python's integers, which neither wrap nor have a sign bit."""
    word = (word ^ word >> 30) * MIX_1 & MASK
    word = (word ^ word >> 27) * MIX_2 & MASK
    return word ^ word >> 31


def unmix(word: int) -> int:
    word ^= word >> 31 ^ word >> 62
    word = word * pow(MIX_2, -1, 2**64) & MASK
    word ^= word >> 27 ^ word >> 54
    word = word * pow(MIX_1, -1, 2**64) & MASK
    return word ^ word >> 30 ^ word >> 60


def signed(word: int) -> int:
    return word - 2**64 if word >> 63 else word


def test_splitmix64_published_values():
    # The first outputs of the reference program, for two seeds.
    expected = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    for seed, words in expected.items():
        assert splitmix64(torch.tensor(seed), torch.arange(3)).tolist() == [signed(word) for word in words]


@given(INT64, INT64)
def test_splitmix64_in_whole_integers(seed, index):
    expected = mix((seed + (index + 1) * GAMMA) & MASK)
    assert splitmix64(torch.tensor(seed), torch.tensor(index)).item() == signed(expected)


def test_uniform_is_the_top_32_bits():
    seed, position, lane = 42, 7, 3
    stream = mix((seed + (position + 1) * GAMMA) & MASK)
    word = mix((stream + (lane + 1) * GAMMA) & MASK)
    drawn = uniform(torch.tensor([seed]), torch.tensor([position]), 4)
    assert drawn[0, lane].item() == np.float32(np.float32(word >> 32) + np.float32(0.5)) * np.float32(2.0**-32)


def test_known_answers():
    drawn = uniform(torch.tensor([0, 1]), torch.tensor([0, 5]), 3)
    assert drawn.tolist() == [
        [0.6524484753608704, 0.7012121081352234, 0.3871241509914398],
        [0.9939067363739014, 0.14616166055202484, 0.8578758835792542],
    ]


def test_lanes_may_be_named():
    seed, position = torch.tensor([3, 4]), torch.tensor([10, 11])
    every = uniform(seed, position, 100)
    lanes = torch.tensor([[5, 99, 0], [17, 5, 5]])
    assert torch.equal(uniform(seed, position, lanes), every.gather(1, lanes))
    assert torch.equal(uniform(seed, position, lanes[0]), every[:, lanes[0]])


@pytest.mark.parametrize("word", [0, MASK])
def test_the_interval_is_open_at_both_ends(word):
    # The lane whose hash is `word`, found by running the hash backwards.
    stream = splitmix64(torch.tensor(9), torch.tensor(4)).item()
    lane = ((unmix(word) - stream) * pow(GAMMA, -1, 2**64) - 1) & MASK
    arguments = torch.tensor([9]), torch.tensor([4]), torch.tensor([signed(lane)])
    assert 0.0 < uniform(*arguments).item() < 1.0
    assert gumbel(*arguments).isfinite().all()


def samples() -> np.ndarray:
    """(seed, position, lane): small neighbouring numbers, as an engine uses them."""
    seeds, positions = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    return uniform(seeds.flatten(), positions.flatten(), 256).view(64, 64, 256).double().numpy()


def test_mean_variance_and_bins():
    u = samples()
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / u.size)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / u.size)
    assert chi_square(u.ravel()) < 5


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seeds", "positions", "lanes"])
def test_neighbours_are_independent(axis):
    u = samples()
    first, second = np.moveaxis(u, axis, 0)[:-1].ravel(), np.moveaxis(u, axis, 0)[1:].ravel()
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(first.size)
    cells = np.floor(first * 16) * 16 + np.floor(second * 16)
    assert chi_square((cells + 0.5) / 256) < 5
    assert np.mean(first == second) < 1e-5


def chi_square(u: np.ndarray) -> float:
    """By how many standard deviations the counts of 256 equal bins are off."""
    counts = np.histogram(u, bins=256, range=(0, 1))[0]
    expected = u.size / 256
    statistic = ((counts - expected) ** 2 / expected).sum()
    return abs(statistic - 255) / math.sqrt(2 * 255)


def test_gumbel_distribution():
    g = np.sort(gumbel(torch.arange(64), torch.arange(64), 4096).double().numpy().ravel())
    cumulative = np.exp(-np.exp(-g))
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed once in a thousand times.
    assert np.abs(cumulative - (np.arange(g.size) + 0.5) / g.size).max() < 1.95 / math.sqrt(g.size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_same_bits():
    seed, position = torch.tensor([0, -(2**63), 12345]), torch.tensor([0, 1, 2**40])
    on_gpu = uniform(seed.cuda(), position.cuda(), 100_000)
    assert torch.equal(on_gpu.cpu(), uniform(seed, position, 100_000))
