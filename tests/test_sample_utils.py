import math

import numpy as np
import pytest
import torch

from gfxlm.engine.params import SamplingParams
from gfxlm.errors import UserError
from gfxlm.sample_utils import make_logits_processors, make_sampler
from tests.engine.sampling_oracle import PENALTIES, chain_of_mlx, kept, logits_of_mlx, random_logprobs


def test_temperature_zero_is_the_argmax():
    logprobs = random_logprobs()
    assert make_sampler()(logprobs).tolist() == logprobs.argmax(1).tolist()


def test_the_stream_moves_on_and_can_be_had_again():
    logprobs = random_logprobs(3)
    first = make_sampler(1.5, top_p=0.9, seed=3)
    calls = [first(logprobs).tolist() for _ in range(20)]
    again = make_sampler(1.5, top_p=0.9, seed=3)
    assert calls == [again(logprobs).tolist() for _ in range(20)]
    assert len({tuple(call) for call in calls}) > 10
    torch.manual_seed(3)
    from_torch = make_sampler(1.5, top_p=0.9)
    assert calls == [from_torch(logprobs).tolist() for _ in range(20)]


def test_rows_are_independent():
    tokens = make_sampler(1.0, seed=0)(torch.zeros(2000, 10))
    counts = np.bincount(tokens.numpy(), minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 9 + 4 * math.sqrt(18)


def test_every_option_reaches_the_filters():
    options = {
        "top_p": 0.97,
        "min_p": 0.001,
        "min_tokens_to_keep": 2,
        "top_k": 5,
        "xtc_probability": 1.0,
        "xtc_threshold": 0.07,
        "xtc_special_tokens": [2],
    }
    logprobs = random_logprobs(1, 24, 1.5)
    tokens = make_sampler(5.0, **options)(logprobs.expand(3000, -1))
    expected = kept(chain_of_mlx(logprobs, SamplingParams(**options)))[0]
    assert set(tokens.tolist()) == set(np.flatnonzero(expected).tolist())


def test_bad_values():
    with pytest.raises(UserError, match=r"top_p must be a number from 0 to 1, but is 1\.5"):
        make_sampler(0.7, top_p=1.5)
    with pytest.raises(UserError, match="repetition_penalty must be a number of at least 0, but is -1"):
        make_logits_processors(repetition_penalty=-1)


@pytest.mark.parametrize("settings", PENALTIES, ids=str)
def test_make_logits_processors(settings):
    logits = torch.randn(1, 16)
    for tokens in ([2], [1, 1, 3, 7, 1, 15, 2, 2, 0, 1, 9, 9]):
        ours = logits
        for processor in make_logits_processors(**settings):
            ours = processor(torch.tensor(tokens), ours)
        expected = logits_of_mlx(settings, tokens, logits)
        torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_half_precision_logits_keep_their_type():
    (processor,) = make_logits_processors(frequency_penalty=0.5)
    out = processor(torch.tensor([1, 1]), torch.zeros(1, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [[0.0, -1.0, 0.0, 0.0]]
