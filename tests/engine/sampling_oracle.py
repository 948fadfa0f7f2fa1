"""What mlx-lm's sampling makes of the same numbers."""

import mlx.core as mx
import mlx_lm.sample_utils as mlx_sampling
import numpy as np
import torch
from torch import Tensor

from gfxlm.engine.params import SamplingParams

V = 97
PENALTIES = (
    {"logit_bias": {3: 1.5, 7: -100.0, 0: 0.25}},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5, "repetition_context_size": 3},
    {"presence_penalty": 0.7, "presence_context_size": 5},
    {"presence_penalty": -0.7},
    {"frequency_penalty": 0.3, "frequency_context_size": 9},
    {
        "logit_bias": {1: -2.0},
        "repetition_penalty": 1.2,
        "repetition_context_size": 4,
        "presence_penalty": 0.5,
        "presence_context_size": 6,
        "frequency_penalty": 0.25,
        "frequency_context_size": 2,
    },
    {"repetition_penalty": 0.0, "presence_penalty": 0.0, "frequency_penalty": None},
)


def random_logprobs(rows: int = 64, vocab_size: int = V, spread: float = 3.0) -> Tensor:
    return torch.log_softmax(torch.randn(rows, vocab_size) * spread, dim=1)


def kept(filtered: Tensor | mx.array) -> np.ndarray:
    return np.asarray(filtered.tolist()) > -np.inf


def chain_of_mlx(logprobs: Tensor, params: SamplingParams) -> mx.array:
    """mlx-lm's filters one after the other, as its make_sampler does, with XTC's coin always heads."""
    x = mx.array(logprobs.numpy())
    if 0 < params.top_p < 1:
        x = mlx_sampling.apply_top_p(x, params.top_p)
    if params.min_p:
        x = mlx_sampling.apply_min_p(x, params.min_p, params.min_tokens_to_keep)
    if params.xtc_probability:
        x = mlx_sampling.apply_xtc(x, 1.0, params.xtc_threshold, list(params.xtc_special_tokens))
    return mlx_sampling.apply_top_k(x, params.top_k) if params.top_k else x


def logits_of_mlx(settings: dict, tokens: list[int], logits: Tensor) -> np.ndarray:
    out = mx.array(logits.numpy())
    for processor in mlx_sampling.make_logits_processors(**settings):
        out = processor(mx.array(tokens), out)
    return np.array(out)
