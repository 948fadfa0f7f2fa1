"""Sampling with functions from outside, as mlx-lm takes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gfxlm.engine.logprobs import Draw, likeliest
from gfxlm.engine.params import SamplingParams

SamplerFunction = Callable[[Tensor], Tensor]
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


@dataclass
class CallbackSampler:
    """Samples with functions from outside, as mlx-lm takes them; processors see the tokens of their request alone."""

    sampler: SamplerFunction
    processors: Sequence[LogitsProcessor] = ()
    tokens: dict[int, list[int]] = field(default_factory=dict)  # by slot
    params: dict[int, SamplingParams] = field(default_factory=dict)

    @property
    def graph_key(self) -> None:
        """The functions run on the host."""
        return None

    @property
    def sequential(self) -> bool:
        """Processors are shown all tokens before."""
        return True

    def set(self, slot: int, params: SamplingParams, prompt_tokens: Sequence[int]) -> None:
        self.tokens[slot], self.params[slot] = list(prompt_tokens), params

    def clear(self, slot: int) -> None:
        del self.tokens[slot], self.params[slot]

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Draw:
        histories = [self.tokens[slot] for slot in slots.tolist()]
        logits = logits.float()
        if self.processors:
            logits = torch.cat([self._process(*row) for row in zip(histories, logits.split(1), strict=True)])
        logprobs = torch.log_softmax(logits, dim=-1)
        sampled = self.sampler(logprobs).long()
        sampled = torch.where(logprobs.amax(-1).isfinite(), sampled, -1)
        for history, token in zip(histories, sampled.tolist(), strict=True):
            history.append(token)
        wanted = any(params.top_logprobs is not None for params in self.params.values())
        return Draw(sampled, logprobs, likeliest(logprobs, sampled) if wanted else None)

    def _process(self, tokens: list[int], logits: Tensor) -> Tensor:  # (1, V) -> (1, V)
        for processor in self.processors:
            logits = processor(torch.tensor(tokens, device=logits.device), logits)
        return logits


def _greedy(logprobs: Tensor) -> Tensor:
    return logprobs.argmax(-1)


def callbacks(
    sampler: SamplerFunction | None, logits_processors: Sequence[LogitsProcessor] | None
) -> CallbackSampler | None:
    """A sampler of mlx-lm's functions, None where there are none."""
    if not sampler and not logits_processors:
        return None
    return CallbackSampler(sampler or _greedy, logits_processors or ())
