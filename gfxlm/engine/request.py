"""One prompt on its way through the engine, and what is asked of a sampler."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from gfxlm.engine.decode import Sampled, StepSampler
from gfxlm.engine.params import SamplingParams
from gfxlm.nn.cache import Cache

FinishReason = Literal["stop", "length", "error"]


class TokenSampler(StepSampler, Protocol):
    """What the engine asks of a sampler: `gfxlm.engine.sampler.Sampler`, or one that calls the user's functions."""

    @property
    def sequential(self) -> bool:
        """Whether it remembers what it puts out, so that it must be asked for a slot's tokens one after the other."""

    def set(self, slot: int, params: SamplingParams, prompt_tokens: Sequence[int]) -> None: ...

    def clear(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that was sampled; log probabilities (V,) if they are wanted; whether it had been drafted."""

    token: int
    logprobs: Tensor | None
    from_draft: bool


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and what has become of it."""

    prompt: Sequence[int]
    params: SamplingParams
    slot: int = -1
    prefilled: int = 0  # prompt tokens that are in the cache
    tokens: list[int] = field(default_factory=list)
    logprobs: Tensor | None = None  # (V,) of the last token, where the params ask for them
    finish_reason: FinishReason | None = None
    error: str | None = None
    prefix: Cache | None = None  # a cache of one slot that holds what comes before the prompt
    keep_cache: bool = False
    cache: Cache | None = None  # of one slot, with everything up to the last token, where `keep_cache` asked for it
    cached_tokens: Sequence[int] = ()  # what comes before the prompt, if anybody said so: for drafts alone
    queue: deque[Choice] = field(default_factory=deque)  # tokens that are sampled, and not handed out yet
    replay: int = 0  # tokens before the last one that recurrent layers have to take in again
    from_draft: bool = False  # whether the last token had been drafted
    drafted: int = 0  # how many tokens have been
    accepted: int = 0  # and how many of them were right
    misses: int = 0  # passes in a row whose drafts were all wrong
    rest: int = 0  # steps until there will be drafts again

    @property
    def pending(self) -> Sequence[int]:
        """Tokens that the model has to be given: the rest of the prompt, or the last token and what it goes with."""
        return self.prompt[self.prefilled :] or self.tokens[-1 - self.replay :]


@dataclass(frozen=True, slots=True)
class Launched:
    """A decode step under way: its requests in the order of its rows, and whether it is the last one they can have."""

    ends: dict[Request, bool]
    sampled: Sampled
