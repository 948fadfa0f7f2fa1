"""Many requests over one model: each step feeds prompts in chunks and every running request its last token."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gfxlm.device.arch import architecture
from gfxlm.device.ceilings import synchronize
from gfxlm.device.graph import shared_pool
from gfxlm.device.memory import empty_cache
from gfxlm.device.threads import single_thread
from gfxlm.engine.budget import Budget, is_out_of_memory, make_cache, states_to_save
from gfxlm.engine.decode import DecodeStep
from gfxlm.engine.drafters import Drafter, Target, remaining_with
from gfxlm.engine.grammar import Constraints, GrammarSource
from gfxlm.engine.lifecycle import Lifecycle
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.prefill import Fed, PrefillStep
from gfxlm.engine.prefix import prefixes_of
from gfxlm.engine.request import Launched, Request, TokenSampler, check_prompt, choices
from gfxlm.engine.sampler import Sampler
from gfxlm.engine.scheduler import Scheduler
from gfxlm.engine.speculative import Speculation, check_drafts
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache

# A step of this few rows over this few bytes of weights is done before other threads are awake.
_FEW_ROWS = 8
_SMALL_BYTES = 64 << 20


class Engine:
    """Continuous batching over one model and one cache of fixed address.

    `max_batch` requests run at once, each with up to `max_context` positions; the others wait in the order they came,
    at most `max_waiting` of them.
    A `cache` from outside is continued: a request begins with what its slot holds, and leaves its own tokens there.
    With `overlap`, the default on a GPU, prompts are fed beside the decode steps, not in them, and a decode step is
    launched before the tokens of the one before it are read.
    With a `drafter`, which then is this engine's own, requests decode speculatively (see `gfxlm.engine.speculative`):
    the tokens are the same, and more than one of them may come of one pass of the model.
    `batch_invariant` makes a request's numbers, bit by bit, independent of what else runs: prompts are fed one by one,
    and decode steps always have a row for every slot, or else one request each.
    With a `prefix_cache`, keys and values stay until their room is needed: a prompt that begins like an earlier one is
    fed only from there on (see `gfxlm.engine.prefix`). `budget` is what there is of memory, for so many slots and with
    the drafter, if the caller has found out; the cache is made by it.
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
        prefix_cache: bool = False,
        max_waiting: int | None = None,
        grammars: GrammarSource | None = None,
        budget: Budget | None = None,
    ) -> None:
        if prefill_step_size < 1:
            raise UserError(f"prefill_step_size must be at least 1, but is {prefill_step_size}")
        self.model = model
        self.eos_token_ids = frozenset(eos_token_ids)
        self.prefill_step_size = prefill_step_size
        self._owns_cache = cache is None
        states = None
        if cache is None:
            budget = budget or remaining_with(drafter, model, slots=max_batch, prefill_step_size=prefill_step_size)
            states = states_to_save(model, budget) if prefix_cache else None
            context, exact = max_context or model.config.max_position_embeddings, max_context is not None
            cache = make_cache(model, budget, context, exact=exact, saved_states=states)
        self.cache = cache
        self._prefixes = None
        if prefix_cache:
            step = prefill_step_size if batch_invariant else None
            self._prefixes = prefixes_of(cache, own=self._owns_cache, step=step, states=states or 0)
        if drafter is not None:
            check_drafts(self.cache, batch_invariant=batch_invariant)
        # One slot more: rows that pad a batch are sampled there.
        self.sampler = sampler or Sampler(len(self.cache.lengths) + 1, model.config.vocab_size, model.device)
        self.grammars = grammars
        self._constraints = Constraints(grammars, self.sampler)
        overlap = model.device.type != "cpu" if overlap is None else overlap
        # Only kernels leave rows of padding alone, which every recording has.
        pool = self._pool = shared_pool(model.device) if overlap and architecture(model.device).kernels else None
        slots = len(self.cache.lengths)
        rows = max(prefill_step_size, slots * Speculation.rows(drafter) if drafter else 0)
        self._prefill_step = PrefillStep(
            model, self.cache, rows, pool, small=drafter is not None, always_recorded=batch_invariant
        )
        self._decode_step = None
        if overlap and not (batch_invariant and pool is None):
            self._decode_step = DecodeStep(model, self.cache, self.sampler, pool, one_size=batch_invariant)
        self._scheduler = Scheduler(
            self.cache,
            prefill_step_size,
            prefixes=self._prefixes,
            max_waiting=max_waiting,
            one_by_one=batch_invariant,
        )
        self._one_by_one = batch_invariant
        self._drafter = drafter
        self._speculation = None
        if drafter is not None:
            drafter.attach(Target(model, slots, self.cache.max_context, self.sampler, rows, pool))
            self._speculation = Speculation(drafter, model, self.cache, self.sampler, self._prefill_step)
        self._lifecycle = Lifecycle(
            model,
            self.cache,
            self._scheduler,
            self.sampler,
            self._constraints,
            self._prefill_step,
            eos_token_ids=self.eos_token_ids,
            owns_cache=self._owns_cache,
            prefixes=self._prefixes,
            drafter=drafter,
            speculation=self._speculation,
        )
        self._verified: set[Request] = set()  # of whose last tokens the decode step does not know
        self._small = model.device.type == "cpu" and model.weight_bytes < _SMALL_BYTES

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """True while a request waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def positions(self) -> int:
        """Of how many positions there can be keys and values."""
        return self.cache.positions

    @property
    def free_positions(self) -> int:
        """And how many of those no request has been promised."""
        return self._scheduler.free_positions

    @property
    def prefix_queries(self) -> int:
        """How many prompt tokens came, and were looked for in the prefix cache."""
        return 0 if self._prefixes is None else self._prefixes.queries

    @property
    def prefix_hits(self) -> int:
        """How many of them were there."""
        return 0 if self._prefixes is None else self._prefixes.hits

    def clear_prefixes(self) -> None:
        """Forget what prompts began with."""
        if self._prefixes is not None:
            self._prefixes.clear()

    @property
    def _running(self) -> list[Request]:
        return self._scheduler.running

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        prefix: Cache | None = None,
        keep_cache: bool = False,
        cached_tokens: Sequence[int] = (),
        timeout: float | None = None,
    ) -> Request:
        """Queue a prompt. Raises UserError if it is empty, has unknown tokens or does not fit into the context.

        BusyError where too many wait. After `timeout` seconds, waiting included, it ends with an error.
        `cached_tokens` are those of the cache that it continues, where they are known: a drafter wants to see them.
        """
        cached = max(self.cache.lengths) if prefix is None else prefix.lengths[0]
        cached = 0 if self._owns_cache and prefix is None else cached
        check_prompt(prompt, self.model.config.vocab_size, cached, self.cache.max_context)
        if prefix is not None:
            self.cache.order_of(prefix, 0)
        self._constraints.check(params.grammar)
        request = Request(
            list(prompt),
            params,
            prefix=prefix,
            keep_cache=keep_cache,
            cached_tokens=tuple(cached_tokens),
            timeout=timeout,
        )
        self._scheduler.add(request)
        return request

    @property
    def prefilling(self) -> bool:
        """True while a prompt is not in the cache yet."""
        return bool(self.waiting) or any(request.feeding for request in self._running)

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
        if self._owns_cache:
            self.add([0], SamplingParams(max_tokens=2))
        while self.busy:
            self.step()
        if self._prefixes is not None:
            self._prefixes.queries = 0

    @torch.inference_mode()
    def finish(self, request: Request) -> None:
        """End a request that waits or runs, as if it had stopped by itself."""
        request.finish_reason = "stop"
        self._lifecycle.release(request)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Run the model once over everything that is due; returns the requests that got a token or ended.

        Raises nothing. What is raised ends the requests that it was for: one alone if it was its own work, all that
        decode if it was theirs. Prompts that were fed together are fed again one by one, to see which one it was.
        """
        ended = self._lifecycle.end_late()
        self._lifecycle.at_work = ()
        self._lifecycle.served.clear()
        try:
            self._sample_launched()
            ended += self._lifecycle.admit()
            return [*ended, *self._step()]
        except Exception as error:
            fault, short = self._lifecycle.fault(error), is_out_of_memory(error)
        # Behind the exception, whose traceback holds what the step had allocated.
        if short:
            self._free_recordings()
        empty_cache(self.model.device)
        return [*ended, *self._lifecycle.recover(fault)]

    @torch.inference_mode()
    def close(self) -> None:
        """End who waits or runs, and free what recordings take; a cache goes with the engine. Waits for the device."""
        self._lifecycle.launched = None
        for request in (*self._running, *self._scheduler.waiting):
            self._lifecycle.fail(request, "the engine was closed")
        self._free_recordings()

    def _free_recordings(self) -> None:
        """What is needed again is recorded again. Waits for the device."""
        launched = self._lifecycle.launched
        if launched is not None and launched.sampled is None:
            return  # its logits lie among them
        synchronize(self.model.device)
        for recorded in (self._prefill_step, self._decode_step, self._drafter):
            if recorded is not None:
                recorded.reset()
        if self._pool is not None:
            self._pool.renew()

    def _step(self) -> list[Request]:
        self._scheduler.grow()
        self._constraints.update()
        if accepted := [request for request in self._running if request.queue]:
            return [self._lifecycle.go_on(request) for request in accepted]
        drafts = self._drafts()
        if self._decode_step is not None:
            return self._overlapped_step(self._decode_step, drafts)
        self._lifecycle.advance()
        chunk = self._scheduler.chunk()
        decoding = [(request, 1) for request in self._running if not request.feeding and request not in drafts]
        ready: list[Request] = []
        for part in [*([one] for one in decoding), chunk] if self._one_by_one else [decoding, chunk]:
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
        if drafts and self._lifecycle.launched is None:
            return [*(self._lifecycle.read(begun) if begun else ()), *self._verify(drafts)]
        current = self._lifecycle.launched = self._lifecycle.launched or self._launch(decode_step)
        if current is not None:
            # A sampler on the host has to see this step's tokens first, and who has drafts waits for them to be read.
            ahead = self.sampler.graph_key is not None and not drafts
            self._lifecycle.launched = self._launch(decode_step) if ahead else None
        return [*(self._lifecycle.read(begun) if begun else ()), *(self._lifecycle.read(current) if current else ())]

    def _drafts(self) -> dict[Request, Sequence[int]]:
        """The drafts of all requests that decode, nothing where plain decoding is as good."""
        if self._speculation is None:
            return {}
        self._lifecycle.at_work = [request for request in self._running if request.tokens]
        return self._speculation.plan(self._lifecycle.at_work)

    def _verify(self, drafts: dict[Request, Sequence[int]]) -> list[Request]:
        """Run the model over last tokens and drafts, and hand out the first token of what it has accepted."""
        if self._speculation is None or not drafts:
            return []
        self._lifecycle.at_work = list(drafts)
        self._speculation.verify(drafts)
        for request in drafts:
            self._lifecycle.take(request)
        self._verified.update(drafts)
        return list(drafts)

    def _begin(self, decode_step: DecodeStep) -> Launched | None:
        """Feed a chunk; the first tokens of the requests whose prompts it ends."""
        self._lifecycle.advance()
        work = self._scheduler.chunk()
        if not work:
            return None
        ready, rows, fed = self._feed(work)
        if not ready:
            return None
        hidden, positions, _ = fed.at(rows)
        sampled = decode_step.begin([request.slot for request in ready], hidden, positions)
        return Launched({request: self._lifecycle.at_limit(request, 1) for request in ready}, sampled)

    def _launch(self, decode_step: DecodeStep) -> Launched | None:
        """One decode step of all that decode, but for those of which it is known that the step before ends them."""
        under_way = self._lifecycle.launched
        before = under_way.ends if under_way else {}
        requests = [request for request in self._running if request.tokens and not before.get(request)]
        if not requests:
            return None
        self._lifecycle.at_work = requests
        slots = [request.slot for request in requests]
        moved = {request.slot: request.tokens[-1] for request in requests if request in self._verified}
        if moved:
            decode_step.place(moved)
            self._verified.clear()
        # Grammars have to see the tokens of the step before: that is read while the model runs.
        waits = under_way is not None and self._constraints.any(slots)
        if waits:
            decode_step.forward(slots)
        sampled = None if waits else decode_step.run(slots)
        for slot in slots:
            self.cache.lengths[slot] += 1
        counts = [len(request.tokens) + (request in before) + 1 for request in requests]
        ends = [self._lifecycle.at_limit(request, count) for request, count in zip(requests, counts, strict=True)]
        return Launched(dict(zip(requests, ends, strict=True)), sampled)

    def _sample_launched(self) -> None:
        """Launch the sampling of a step that had to wait for the tokens of the one before. They have been read."""
        launched = self._lifecycle.launched
        if self._decode_step is not None and launched is not None and launched.sampled is None:
            self._lifecycle.launched, self._lifecycle.at_work = None, list(launched.ends)
            self._constraints.update()
            sampled = self._decode_step.sample([request.slot for request in launched.ends])
            self._lifecycle.launched = Launched(launched.ends, sampled)

    def _feed(self, work: list[tuple[Request, int]]) -> tuple[list[Request], list[int], Fed]:
        """Give the model so many tokens of each request; those who then wait for a token, and their last rows."""
        self._lifecycle.at_work = [request for request, _ in work]
        tokens = [token for request, count in work for token in request.pending[:count]]
        fed = self._prefill_step.run(tokens, [request.slot for request, _ in work], [count for _, count in work])
        ready, rows = [], []
        for (request, count), span in zip(work, fed.spans, strict=True):
            request.prefilled = min(request.prefilled + count, len(request.prompt))
            if self._prefixes is not None and not request.tokens:
                self._prefixes.fed(request)
            if request.prefilled == len(request.prompt):
                ready.append(request)
                rows.append(span.stop - 1)
        return ready, rows, fed

    def _take_tokens(self, requests: list[Request], hidden: Tensor, positions: Tensor, slots: Tensor) -> None:
        draw = self.sampler.sample(self.model.logits(hidden), slots, positions)
        for request, choice in zip(requests, choices(draw), strict=True):
            self._lifecycle.accept(request, choice, self._lifecycle.at_limit(request, len(request.tokens) + 1))
