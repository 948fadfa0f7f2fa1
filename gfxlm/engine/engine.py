"""Many requests over one model: each step feeds prompts in chunks and every running request its last token."""

from collections import deque
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gfxlm.device.arch import architecture
from gfxlm.device.graph import shared_pool
from gfxlm.device.memory import empty_cache
from gfxlm.device.threads import single_thread
from gfxlm.engine.budget import explain_out_of_memory, is_out_of_memory, make_cache
from gfxlm.engine.decode import DecodeStep
from gfxlm.engine.diagnose import first_nan_module
from gfxlm.engine.drafters import Drafter, Target
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.prefill import Fed, PrefillStep
from gfxlm.engine.request import Launched, Request, TokenSampler
from gfxlm.engine.sampler import Sampler
from gfxlm.engine.speculative import Speculation
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache

# A step of this few rows over this few bytes of weights is done before other threads are awake.
_FEW_ROWS = 8
_SMALL_BYTES = 64 << 20


class Engine:
    """Continuous batching over one model and one cache of fixed address.

    `max_batch` requests run at once, each with up to `max_context` positions; the others wait in the order they came.
    A `cache` from outside is continued: a request begins with what its slot holds, and leaves its own tokens there.
    With `overlap`, the default on a GPU, prompts are fed beside the decode steps, not in them, and a decode step is
    launched before the tokens of the one before it are read.
    With a `drafter`, which then is this engine's own, requests decode speculatively (see `gfxlm.engine.speculative`):
    the tokens are the same, and more than one of them may come of one pass of the model.
    `batch_invariant` makes a request's numbers, bit by bit, independent of what else runs: prompts are fed one by one,
    and decode steps always have a row for every slot, or else one request each.
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
        drafter: Drafter | None = None,
        batch_invariant: bool = False,
    ) -> None:
        if prefill_step_size < 1:
            raise UserError(f"prefill_step_size must be at least 1, but is {prefill_step_size}")
        self.model = model
        self.eos_token_ids = frozenset(eos_token_ids)
        self.prefill_step_size = prefill_step_size
        self._owns_cache = cache is None
        self.cache = cache or make_cache(
            model,
            max_batch,
            max_context or model.config.max_position_embeddings,
            exact=max_context is not None,
            prefill_step_size=prefill_step_size,
        )
        if drafter is not None and self.cache.ring is not None:
            raise UserError(
                "max_kv_size: a cache that forgets cannot take back a draft_model's or a prompt look-up's drafts"
            )
        if drafter is not None and batch_invariant:
            raise UserError("batch_invariant: passes over drafts have as many rows as there are drafts")
        # One slot more: rows that pad a batch are sampled there.
        self.sampler = sampler or Sampler(len(self.cache.lengths) + 1, model.config.vocab_size, model.device)
        overlap = model.device.type != "cpu" if overlap is None else overlap
        # Only kernels leave rows of padding alone, which every recording has.
        pool = shared_pool(model.device) if overlap and architecture(model.device).kernels else None
        slots = len(self.cache.lengths)
        rows = max(prefill_step_size, slots * Speculation.rows(drafter) if drafter else 0)
        self._prefill_step = PrefillStep(
            model, self.cache, rows, pool, small=drafter is not None, always_recorded=batch_invariant
        )
        self._decode_step = None
        if overlap and not (batch_invariant and pool is None):
            self._decode_step = DecodeStep(model, self.cache, self.sampler, pool, one_size=batch_invariant)
        self._alone = batch_invariant
        self._launched: Launched | None = None
        self._drafter = drafter
        self._speculation = None
        if drafter is not None:
            drafter.attach(Target(model, slots, self.cache.max_context, self.sampler, rows, pool))
            self._speculation = Speculation(drafter, model, self.cache, self.sampler, self._prefill_step)
        self._verified: set[Request] = set()  # of whose last tokens the decode step does not know
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
        cached_tokens: Sequence[int] = (),
    ) -> Request:
        """Queue a prompt. Raises UserError if it is empty, has unknown tokens or does not fit into the context.

        `cached_tokens` are those of the cache that it continues, where they are known: a drafter wants to see them.
        """
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
        if prefix is not None:
            self.cache.order_of(prefix, 0)
        request = Request(
            list(prompt), params, prefix=prefix, keep_cache=keep_cache, cached_tokens=tuple(cached_tokens)
        )
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
        if self._drafter is not None:
            self._drafter.warm_up()
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
        """Run the model once over everything that is due; returns the requests that got a token or failed.

        Where memory runs out, those whose prompts are being fed fail, or else all that run.
        """
        self._admit()
        try:
            return self._step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = explain_out_of_memory(error, self.model, self.cache)
        # Behind the exception, whose traceback holds what the step had allocated.
        feeding = [request for request in self._running if request.prefilled < len(request.prompt)]
        failed = feeding or list(self._running)
        for request in failed:
            self._fail(request, reason)
        empty_cache(self.model.device)
        return failed

    def _step(self) -> list[Request]:
        if accepted := [request for request in self._running if request.queue]:
            return [self._hand_out(request) for request in accepted]
        drafts = self._drafts()
        if self._decode_step is not None:
            return self._overlapped_step(self._decode_step, drafts)
        work = self._plan([request for request in self._running if request not in drafts])
        ready: list[Request] = []
        for part in [[one] for one in work] if self._alone else [work]:
            with single_thread(self._small and sum(count for _, count in part) <= _FEW_ROWS):
                ready += self._run(part)
        return ready + self._verify(drafts)

    def _run(self, work: list[tuple[Request, int]]) -> list[Request]:
        if not work:
            return []
        ready, rows, fed = self._feed(work)
        if ready:
            self._take_tokens(ready, *fed.at(rows))
        return ready

    def _overlapped_step(self, decode_step: DecodeStep, drafts: dict[Request, Sequence[int]]) -> list[Request]:
        """Launch a chunk of the prompts that wait and the next decode step, then read the decode step before."""
        begun = self._begin(decode_step)
        if drafts and self._launched is None:
            return [*(self._read(begun) if begun else ()), *self._verify(drafts)]
        current = self._launched or self._launch(decode_step)
        if current is not None:
            self._launched = current
            # A sampler on the host has to see this step's tokens first, and who has drafts waits for them to be read.
            self._launched = None if self.sampler.graph_key is None or drafts else self._launch(decode_step)
        return [*(self._read(begun) if begun else ()), *(self._read(current) if current else ())]

    def _drafts(self) -> dict[Request, Sequence[int]]:
        """The drafts of all requests that decode, nothing where plain decoding is as good."""
        if self._speculation is None:
            return {}
        return self._speculation.plan([request for request in self._running if request.tokens])

    def _verify(self, drafts: dict[Request, Sequence[int]]) -> list[Request]:
        """Run the model over last tokens and drafts, and hand out the first token of what it has accepted."""
        if self._speculation is None or not drafts:
            return []
        self._speculation.verify(drafts)
        self._verified.update(drafts)
        for request in drafts:
            self._take(request)
        return list(drafts)

    def _hand_out(self, request: Request) -> Request:
        """Go on by a token that the model has seen already, as a draft."""
        if request.replay:
            request.replay += 1
        else:
            self.cache.lengths[request.slot] += 1
        return self._take(request)

    def _take(self, request: Request) -> Request:
        choice = request.queue.popleft()
        ends = self._at_limit(request, len(request.tokens) + 1)
        self._accept(request, choice.token, choice.logprobs, ends, from_draft=choice.from_draft)
        return request

    def _begin(self, decode_step: DecodeStep) -> Launched | None:
        """Feed a chunk; the first tokens of the requests whose prompts it ends."""
        work = self._plan([request for request in self._running if request.prefilled < len(request.prompt)])
        if not work:
            return None
        ready, rows, fed = self._feed(work[:1] if self._alone else work)
        if not ready:
            return None
        hidden, positions, _ = fed.at(rows)
        sampled = decode_step.begin([request.slot for request in ready], hidden, positions)
        return Launched({request: self._at_limit(request, 1) for request in ready}, sampled)

    def _launch(self, decode_step: DecodeStep) -> Launched | None:
        """One decode step of all that decode, but for those of which it is known that the step before ends them."""
        before = self._launched.ends if self._launched else {}
        requests = [request for request in self._running if request.tokens and not before.get(request)]
        if not requests:
            return None
        slots = [request.slot for request in requests]
        moved = {request.slot: request.tokens[-1] for request in requests if request in self._verified}
        if moved:
            decode_step.place(moved)
            self._verified.clear()
        sampled = decode_step.run(slots)
        for slot in slots:
            self.cache.lengths[slot] += 1
        counts = [len(request.tokens) + (request in before) + 1 for request in requests]
        ends = [self._at_limit(request, count) for request, count in zip(requests, counts, strict=True)]
        return Launched(dict(zip(requests, ends, strict=True)), sampled)

    def _read(self, launched: Launched) -> list[Request]:
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
            request, slot = self._waiting[0], self._free[0]
            if not self.cache.reserve(slot, self._positions(request, slot)):
                return  # until others leave: there is room for each of them alone
            self._waiting.popleft()
            self._free.popleft()
            if request.prefix is not None:
                self.cache.copy_slot(slot, request.prefix, 0)
            self.sampler.set(slot, request.params, request.prompt)
            if self._drafter is not None:
                self._drafter.begin(slot, [*request.cached_tokens, *request.prompt])
            request.slot = slot
            self._running.append(request)

    def _positions(self, request: Request, slot: int) -> int:
        """All that a request may come to have in the cache."""
        before = self.cache.lengths[slot] if request.prefix is None else request.prefix.lengths[0]
        most, limit = request.params.max_tokens, self.cache.max_context
        return limit if most < 0 else min(limit, before + len(request.prompt) + most)

    def _plan(self, requests: Sequence[Request]) -> list[tuple[Request, int]]:
        """How many tokens each of the requests feeds this step; prompts share a budget."""
        work, budget = [], self.prefill_step_size
        for request in requests:
            decoding = request.prefilled == len(request.prompt)
            count = 1 if decoding else min(len(request.pending), budget)
            budget -= 0 if decoding or self._alone else count
            if count:
                work.append((request, count))
        return work

    def _take_tokens(self, requests: list[Request], hidden: Tensor, positions: Tensor, slots: Tensor) -> None:
        tokens, logprobs = self.sampler.sample(self.model.logits(hidden), slots, positions)
        for row, (request, token) in enumerate(zip(requests, tokens.tolist(), strict=True)):
            ends = self._at_limit(request, len(request.tokens) + 1)
            self._accept(request, token, None if logprobs is None else logprobs[row], ends)

    def _accept(
        self, request: Request, token: int, logprobs: Tensor | None, ends: bool, *, from_draft: bool = False
    ) -> None:
        if token < 0:
            place = first_nan_module(self.model, [*request.prompt, *request.tokens])
            self._fail(request, f"the logits are not finite; the first bad values come out of {place}")
            return
        request.tokens.append(token)
        request.from_draft = from_draft
        if self._drafter is not None:
            self._drafter.extend(request.slot, token)
        request.logprobs = logprobs if request.params.logprobs else None
        if token in self.eos_token_ids:
            request.finish_reason = "stop"
        elif ends:
            request.finish_reason = "length"
        if request.finish_reason is not None:
            self._release(request)

    def _at_limit(self, request: Request, tokens: int) -> bool:
        """Whether a request that has so many tokens, the last of them not yet in the cache, can have no more."""
        positions = self.cache.lengths[request.slot] + request.replay
        return tokens == request.params.max_tokens or positions == self.cache.max_context

    def _fail(self, request: Request, reason: str) -> None:
        request.error, request.finish_reason = reason, "error"
        self._release(request)

    def _release(self, request: Request) -> None:
        slot = request.slot
        self._running.remove(request)
        self.sampler.clear(slot)
        self._verified.discard(request)
        if self._drafter is not None:
            self._drafter.end(slot)
        if self._speculation is not None and request.queue:
            self._speculation.take_back(request)
            request.queue.clear()
        self._free.append(slot)
        continued = request.keep_cache or not self._owns_cache
        fed = self._launched is not None and request in self._launched.ends
        if continued and request.tokens and request.error is None and not fed:
            # Whoever goes on from this cache expects the last token in it.
            pending = request.pending[: self.cache.max_context - self.cache.lengths[slot]]
            if pending:
                self._prefill_step.run(pending, [slot], [len(pending)])
        if request.keep_cache and request.error is None:
            request.cache = self.model.make_cache(1, self.cache.max_context)
            request.cache.copy_slot(0, self.cache, slot)
        if self._owns_cache:
            self.cache.release(slot)
