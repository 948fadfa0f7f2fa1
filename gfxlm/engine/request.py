"""One prompt on its way through the engine, and what is asked of a sampler."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from gfxlm.engine.decode import Sampled, StepSampler
from gfxlm.engine.logprobs import Draw, TokenLogprob
from gfxlm.engine.params import SamplingParams
from gfxlm.errors import GenerationError, UserError
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
    """A token that was sampled; log probabilities (V,) and a row of `likeliest` if wanted; whether it was drafted."""

    token: int
    logprobs: Tensor | None
    top: Tensor | None
    from_draft: bool = False


def choices(draw: Draw) -> list[Choice]:
    """A draw's rows, one by one. Waits for the tokens and for `top` where they are not in host memory."""
    rows = len(draw.tokens)
    logprobs = [None] * rows if draw.logprobs is None else list(draw.logprobs)
    top = [None] * rows if draw.top is None else list(draw.top.cpu())
    return [Choice(*row) for row in zip(draw.tokens.tolist(), logprobs, top, strict=True)]


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and what has become of it."""

    prompt: Sequence[int]
    params: SamplingParams
    slot: int = -1
    prefilled: int = 0  # prompt tokens that are in the cache
    tokens: list[int] = field(default_factory=list)
    logprobs: Tensor | None = None  # (V,) of the last token, where the params ask for them
    logprob: TokenLogprob | None = None  # of the last token, where the params ask for `top_logprobs`
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
    timeout: float | None = None  # seconds from `added` on that it may take in all
    added: float = field(default_factory=time.monotonic)
    started: float | None = None  # when it got a slot, by the same clock
    timed_out: bool = False
    exception: Exception | None = None  # what was raised where its own work failed
    cached: int = 0  # prompt tokens that the prefix cache had
    digests: list[bytes] = field(default_factory=list)  # of its text's full pages, by the prefix cache
    published: list[int] = field(default_factory=list)  # pages that it has let others know of
    borders: Sequence[int] = ()  # positions at which others may want to go on from its recurrent state
    alone: bool = False  # its prompt was part of a chunk that failed: it is fed in one of its own

    @property
    def feeding(self) -> bool:
        """Whether its prompt is not in the cache yet."""
        return self.prefilled < len(self.prompt)

    def check(self) -> None:
        """Raise what it failed with, if it did: the exception itself, or GenerationError with what there is to say."""
        if self.exception is not None:
            raise self.exception
        if self.error is not None:
            raise GenerationError(self.error)

    def expired(self, now: float) -> bool:
        """Whether it has had its time."""
        return self.timeout is not None and now >= self.added + self.timeout

    @property
    def pending(self) -> Sequence[int]:
        """Tokens that the model has to be given: the rest of the prompt, or the last token and what it goes with."""
        return self.prompt[self.prefilled :] or self.tokens[-1 - self.replay :]


def check_prompt(prompt: Sequence[int], vocab_size: int, cached: int, max_context: int) -> None:
    """Raise UserError for an empty prompt, for unknown tokens, and for more than fits behind what is cached."""
    if not prompt:
        raise UserError("the prompt is empty")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise UserError(f"the prompt has token {max(prompt, key=abs)}, the vocabulary has {vocab_size}")
    if cached + len(prompt) > max_context:
        before = f" after {cached} cached ones" if cached else ""
        raise UserError(f"the prompt has {len(prompt)} tokens{before}, but the context holds {max_context}")


@dataclass(frozen=True, slots=True)
class Launched:
    """A decode step under way: its requests in the order of its rows, and whether it is the last one they can have.

    `sampled` is None as long as its sampling waits for a grammar to see the tokens of the step before.
    """

    ends: dict[Request, bool]
    sampled: Sampled | None
