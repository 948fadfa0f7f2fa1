"""mlx-lm's `make_sampler` and `make_logits_processors`, for torch tensors."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gfxlm.engine.params import SamplingParams
from gfxlm.engine.sampler import (
    Sampler,
    add_logit_bias,
    occurrences,
    penalise_frequency,
    penalise_presence,
    penalise_repetition,
)

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: Sequence[int] | None = None,
    *,
    seed: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """A function from log probabilities (R, V) to tokens, int64 (R,).

    It walks along one stream of random numbers, a step a row: that of `seed`, or of torch's initial seed.
    Raises UserError for a value out of range.
    """
    params = SamplingParams(
        temperature=temp,
        top_p=top_p,
        min_p=min_p,
        min_tokens_to_keep=min_tokens_to_keep,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=xtc_special_tokens or (),
        seed=torch.initial_seed() if seed is None else seed,
    )
    return _StreamSampler(params)


class _StreamSampler:
    """One slot of a `Sampler`, which every row of every call shares."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._rows_drawn = 0
        self._sampler: Sampler | None = None

    def __call__(self, logprobs: Tensor) -> Tensor:
        rows, vocab_size = logprobs.shape
        # Only the first logprobs tell the vocabulary's size and the device.
        if self._sampler is None:
            self._sampler = Sampler(1, vocab_size, logprobs.device, max_context=1)
            self._sampler.set(0, self._params)
        positions = torch.arange(self._rows_drawn, self._rows_drawn + rows, device=logprobs.device)
        self._rows_drawn += rows
        return self._sampler.sample(logprobs, torch.zeros_like(positions), positions).tokens


def make_logits_processors(
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int = 20,
    presence_penalty: float | None = None,
    presence_context_size: int = 20,
    frequency_penalty: float | None = None,
    frequency_context_size: int = 20,
) -> list[LogitsProcessor]:
    """Functions from (the tokens so far (n,), logits (R, V)) to new logits (R, V), to be applied in order.

    Raises UserError for a value out of range.
    """
    params = SamplingParams(
        logit_bias=logit_bias,
        repetition_penalty=repetition_penalty,
        repetition_context_size=repetition_context_size,
        presence_penalty=presence_penalty,
        presence_context_size=presence_context_size,
        frequency_penalty=frequency_penalty,
        frequency_context_size=frequency_context_size,
    )
    processors = [_bias_processor(params.logit_bias)] if params.logit_bias else []
    for penalise, penalty, context_size in (
        (penalise_repetition, params.repetition_penalty, params.repetition_context_size),
        (penalise_presence, params.presence_penalty, params.presence_context_size),
        (penalise_frequency, params.frequency_penalty, params.frequency_context_size),
    ):
        if penalty:
            processors.append(_penalty_processor(penalise, penalty, context_size))
    return processors


def _bias_processor(logit_bias: Mapping[int, float]) -> LogitsProcessor:
    tokens, bias = torch.tensor(list(logit_bias)), torch.tensor(list(logit_bias.values()))

    def process(_: Tensor, logits: Tensor) -> Tensor:
        shape = (len(logits), len(tokens))
        return add_logit_bias(logits, tokens.to(logits.device).expand(shape), bias.to(logits.device).expand(shape))

    return process


def _penalty_processor(
    penalise: Callable[[Tensor, Tensor, float], Tensor], penalty: float, context_size: int
) -> LogitsProcessor:
    def process(tokens: Tensor, logits: Tensor) -> Tensor:
        recent = tokens[-context_size:].to(logits.device, torch.int64)
        penalised = penalise(logits.float(), occurrences(recent[None], logits.shape[1]), penalty)
        return penalised.to(logits.dtype)

    return process
