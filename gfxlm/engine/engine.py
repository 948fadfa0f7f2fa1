"""Many requests over one model: each step feeds prompts in chunks and every running request its last token."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from gfxlm.device.arch import architecture
from gfxlm.device.graph import shared_pool
from gfxlm.device.threads import single_thread
from gfxlm.engine.decode import DecodeStep, Sampled, StepSampler
from gfxlm.engine.diagnose import first_nan_module
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.prefill import Fed, PrefillStep
from gfxlm.engine.sampler import Sampler
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache

# A step of this few rows over this few bytes of weights is done before other threads are awake.
_FEW_ROWS = 8
_SMALL_BYTES = 64 << 20

FinishReason = Literal["stop", "length", "error"]


class TokenSampler(StepSampler, Protocol):
    """What the engine asks of a sampler: `gfxlm.engine.sampler.Sampler`, or one that calls the user's functions."""

    def set(self, slot: int, params: SamplingParams, prompt_tokens: Sequence[int]) -> None: ...

    def clear(self, slot: int) -> None: ...


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

    @property
    def pending(self) -> Sequence[int]:
        """Tokens that the model has not seen yet: the rest of the prompt, or the last token."""
        return self.prompt[self.prefilled :] or self.tokens[-1:]


@dataclass(frozen=True, slots=True)
class _Launched:
    """A decode step under way: its requests in the order of its rows, and whether it is the last one they can have."""

    ends: dict[Request, bool]
    sampled: Sampled


class Engine:
    """Continuous batching over one model and one cache of fixed address.

    `max_batch` requests run at once, each with up to `max_context` positions; the others wait in the order they came.
    A `cache` from outside is continued: a request begins with what its slot holds, and leaves its own tokens there.
    With `overlap`, the default on a GPU, prompts are fed beside the decode steps, not in them, and a decode step is
    launched before the tokens of the one before it are read.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        eos_token_ids: Collection[int] = (),
        max_batch: int = 1,
        max_context: int | None = None,
        prefill_step_size: int = 2048,
        cache: Cache | None = None,
        sampler: TokenSampler | None = None,
        overlap: bool | None = None,
    ) -> None:
        if prefill_step_size < 1:
            raise UserError(f"prefill_step_size must be at least 1, but is {prefill_step_size}")
        self.model = model
        self.eos_token_ids = frozenset(eos_token_ids)
        self.prefill_step_size = prefill_step_size
        self._owns_cache = cache is None
        self.cache = cache or model.make_cache(max_batch, max_context or model.config.max_position_embeddings)
        # One slot more: rows that pad a batch are sampled there.
        self.sampler = sampler or Sampler(len(self.cache.lengths) + 1, model.config.vocab_size, model.device)
        overlap = model.device.type != "cpu" if overlap is None else overlap
        # Only kernels leave rows of padding alone, which every recording has.
        pool = shared_pool(model.device) if overlap and architecture(model.device).kernels else None
        self._prefill_step = PrefillStep(model, self.cache, prefill_step_size, pool)
        self._decode_step = DecodeStep(model, self.cache, self.sampler, pool) if overlap else None
        self._launched: _Launched | None = None
        self._small = model.device.type == "cpu" and model.weight_bytes < _SMALL_BYTES
        self._free = deque(range(len(self.cache.lengths)))
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def busy(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._waiting or self._running)

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        prefix: Cache | None = None,
        keep_cache: bool = False,
    ) -> Request:
        """Queue a prompt. Raises UserError if it is empty, has unknown tokens or does not fit into the context."""
        vocab_size = self.model.config.vocab_size
        if not prompt:
            raise UserError("the prompt is empty")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(f"the prompt has token {max(prompt, key=abs)}, the vocabulary has {vocab_size}")
        cached = max(self.cache.lengths) if prefix is None else prefix.lengths[0]
        cached = 0 if self._owns_cache and prefix is None else cached
        if cached + len(prompt) > self.cache.max_context:
            before = f" after {cached} cached ones" if cached else ""
            raise UserError(
                f"the prompt has {len(prompt)} tokens{before}, but the context holds {self.cache.max_context}"
            )
        request = Request(list(prompt), params, prefix=prefix, keep_cache=keep_cache)
        self._waiting.append(request)
        return request

    @property
    def prefilling(self) -> bool:
        """True while a prompt is not in the cache yet."""
        return bool(self._waiting) or any(request.prefilled < len(request.prompt) for request in self._running)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Record what will be replayed, and run all of it once, before the first request instead of during it.

        Only while no request runs; a cache from outside is left as it is.
        """
        self._prefill_step.warm_up()
        if self._decode_step is not None:
            self._decode_step.warm_up()
        if not self._owns_cache:
            return
        self.add([0], SamplingParams(max_tokens=2))
        while self.busy:
            self.step()

    @torch.inference_mode()
    def finish(self, request: Request) -> None:
        """End a request that waits or runs, as if it had stopped by itself."""
        request.finish_reason = "stop"
        if request in self._running:
            self._release(request)
        elif request in self._waiting:
            self._waiting.remove(request)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Run the model once over everything that is due; returns the requests that got a token or failed."""
        self._admit()
        if self._decode_step is not None:
            return self._overlapped_step(self._decode_step)
        work = self._plan(self._running)
        if not work:
            return []
        with single_thread(self._small and sum(count for _, count in work) <= _FEW_ROWS):
            ready, rows, fed = self._feed(work)
            if ready:
                self._take_tokens(ready, *fed.at(rows))
        return ready

    def _overlapped_step(self, decode_step: DecodeStep) -> list[Request]:
        """Launch a chunk of the prompts that wait and the next decode step, then read the decode step before."""
        begun = self._begin(decode_step)
        current = self._launched or self._launch(decode_step)
        if current is not None:
            self._launched = current
            # A sampler on the host has to see this step's tokens first.
            self._launched = None if self.sampler.graph_key is None else self._launch(decode_step)
        return [*(self._read(begun) if begun else ()), *(self._read(current) if current else ())]

    def _begin(self, decode_step: DecodeStep) -> "_Launched | None":
        """Feed a chunk; the first tokens of the requests whose prompts it ends."""
        work = self._plan([request for request in self._running if request.prefilled < len(request.prompt)])
        if not work:
            return None
        ready, rows, fed = self._feed(work)
        if not ready:
            return None
        hidden, positions, _ = fed.at(rows)
        sampled = decode_step.begin([request.slot for request in ready], hidden, positions)
        return _Launched({request: self._at_limit(request, 1) for request in ready}, sampled)

    def _launch(self, decode_step: DecodeStep) -> "_Launched | None":
        """One decode step of all that decode, but for those of which it is known that the step before ends them."""
        before = self._launched.ends if self._launched else {}
        requests = [request for request in self._running if request.tokens and not before.get(request)]
        if not requests:
            return None
        slots = [request.slot for request in requests]
        sampled = decode_step.run(slots)
        for slot in slots:
            self.cache.lengths[slot] += 1
        counts = [len(request.tokens) + (request in before) + 1 for request in requests]
        ends = [self._at_limit(request, count) for request, count in zip(requests, counts, strict=True)]
        return _Launched(dict(zip(requests, ends, strict=True)), sampled)

    def _read(self, launched: "_Launched") -> list[Request]:
        """Hand out a step's tokens to those of its requests that still run."""
        tokens, logprobs = launched.sampled.tokens(), launched.sampled.logprobs
        running = []
        for row, (request, ends) in enumerate(launched.ends.items()):
            if request.finish_reason is None:
                running.append(request)
                self._accept(request, tokens[row], None if logprobs is None else logprobs[row], ends)
        return running

    def _feed(self, work: list[tuple[Request, int]]) -> tuple[list[Request], list[int], Fed]:
        """Give the model so many tokens of each request; those who then wait for a token, and their last rows."""
        tokens = [token for request, count in work for token in request.pending[:count]]
        fed = self._prefill_step.run(tokens, [request.slot for request, _ in work], [count for _, count in work])
        ready, rows = [], []
        for (request, count), span in zip(work, fed.spans, strict=True):
            request.prefilled = min(request.prefilled + count, len(request.prompt))
            if request.prefilled == len(request.prompt):
                ready.append(request)
                rows.append(span.stop - 1)
        return ready, rows, fed

    def _admit(self) -> None:
        while self._waiting and self._free:
            request, slot = self._waiting.popleft(), self._free.popleft()
            if request.prefix is not None:
                self.cache.copy_slot(slot, request.prefix, 0)
            self.sampler.set(slot, request.params, request.prompt)
            request.slot = slot
            self._running.append(request)

    def _plan(self, requests: Sequence[Request]) -> list[tuple[Request, int]]:
        """How many tokens each of the requests feeds this step; prompts share a budget."""
        work, budget = [], self.prefill_step_size
        for request in requests:
            decoding = request.prefilled == len(request.prompt)
            count = 1 if decoding else min(len(request.pending), budget)
            budget -= 0 if decoding else count
            if count:
                work.append((request, count))
        return work

    def _take_tokens(self, requests: list[Request], hidden: Tensor, positions: Tensor, slots: Tensor) -> None:
        tokens, logprobs = self.sampler.sample(self.model.logits(hidden), slots, positions)
        for row, (request, token) in enumerate(zip(requests, tokens.tolist(), strict=True)):
            ends = self._at_limit(request, len(request.tokens) + 1)
            self._accept(request, token, None if logprobs is None else logprobs[row], ends)

    def _accept(self, request: Request, token: int, logprobs: Tensor | None, ends: bool) -> None:
        if token < 0:
            self._fail(request)
            return
        request.tokens.append(token)
        request.logprobs = logprobs if request.params.logprobs else None
        if token in self.eos_token_ids:
            request.finish_reason = "stop"
        elif ends:
            request.finish_reason = "length"
        if request.finish_reason is not None:
            self._release(request)

    def _at_limit(self, request: Request, tokens: int) -> bool:
        """Whether a request that has so many tokens, the last of them not yet in the cache, can have no more."""
        return tokens == request.params.max_tokens or self.cache.lengths[request.slot] == self.cache.max_context

    def _fail(self, request: Request) -> None:
        place = first_nan_module(self.model, [*request.prompt, *request.tokens])
        request.error = f"the logits are not finite; the first bad values come out of {place}"
        request.finish_reason = "error"
        self._release(request)

    def _release(self, request: Request) -> None:
        slot = request.slot
        self._running.remove(request)
        self.sampler.clear(slot)
        self._free.append(slot)
        continued = request.keep_cache or not self._owns_cache
        fits = self.cache.lengths[slot] < self.cache.max_context
        fed = self._launched is not None and request in self._launched.ends
        if continued and fits and request.tokens and request.error is None and not fed:
            # Whoever goes on from this cache expects the last token in it.
            self._prefill_step.run(request.tokens[-1:], [slot], [1])
        if request.keep_cache:
            request.cache = self.model.make_cache(1, self.cache.max_context)
            request.cache.copy_slot(0, self.cache, slot)
        if self._owns_cache:
            self.cache.lengths[slot] = 0
