import json
import math

import pytest

from gfxlm.engine.params import SamplingParams
from gfxlm.errors import UserError


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", -0.1, "a number of at least 0"),
        ("temperature", math.nan, "a number of at least 0"),
        ("temperature", math.inf, "a number of at least 0"),
        ("temperature", "hot", "a number of at least 0"),
        ("top_p", 1.1, "a number from 0 to 1"),
        ("min_p", -1, "a number from 0 to 1"),
        ("top_k", -1, "an integer of at least 0"),
        ("top_k", 2.0, "an integer of at least 0"),
        ("min_tokens_to_keep", 0, "an integer of at least 1"),
        ("xtc_probability", 2, "a number from 0 to 1"),
        ("xtc_threshold", 0.6, "a number from 0 to 0.5"),
        ("repetition_penalty", -1.0, "a number of at least 0"),
        ("presence_penalty", math.inf, "a finite number"),
        ("frequency_context_size", 0, "an integer of at least 1"),
        ("seed", 2**64, "an integer from"),
        ("seed", True, "an integer from"),
        ("max_tokens", 0, "an integer of at least 1"),
        ("max_tokens", -2, "an integer of at least 1"),
    ],
)
def test_out_of_range(name, value, wanted):
    with pytest.raises(UserError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(f"{name} must be {wanted}")
    assert str(caught.value).endswith(f"but is {value!r}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": ["a", ""]}, "stop must be strings that are not empty, but holds ''"),
        ({"stop": [1]}, "stop must be strings that are not empty, but holds 1"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias token must be an integer of at least 0, but is '5'"),
        ({"logit_bias": {5: math.nan}}, r"logit_bias\[5\] must be a finite number, but is nan"),
        ({"logit_bias": {5: math.inf}}, r"logit_bias\[5\] must be a finite number, but is inf"),
        ({"xtc_special_tokens": [-1]}, "xtc_special_tokens must be an integer of at least 0, but is -1"),
    ],
)
def test_bad_collections(settings, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**settings)


def test_one_stop_string_and_copies():
    bias = {1: 2.0}
    params = SamplingParams(stop="END", logit_bias=bias, max_tokens=-1, seed=2**64 - 1)
    bias[2] = 3.0
    assert params.stop == ("END",)
    assert params.logit_bias == {1: 2.0}
    hash(params)


def test_generation_config():
    text = '{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}'
    config = json.loads(text)
    params = SamplingParams.from_generation_config(config)
    assert params == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    overridden = SamplingParams.from_generation_config(config, temperature=0.0, top_k=None, max_tokens=5)
    assert overridden == SamplingParams(temperature=0.0, top_k=20, top_p=0.95, max_tokens=5)


@pytest.mark.parametrize(
    ("config", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.6}, 0.0),
        ({"do_sample": False, "temperature": 0.6}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": None, "top_p": None}, 1.0),
        ({"do_sample": True, "temperature": 0}, 0.0),
    ],
)
def test_only_do_sample_samples(config, temperature):
    assert SamplingParams.from_generation_config(config) == SamplingParams(temperature=temperature)
