"""A request's time in a slot: what it finds there, and what it leaves behind."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from gfxlm.engine.budget import explain_out_of_memory, is_out_of_memory
from gfxlm.engine.diagnose import first_nan_module
from gfxlm.engine.drafters import Drafter
from gfxlm.engine.grammar import Constraints
from gfxlm.engine.logprobs import token_logprob
from gfxlm.engine.prefill import PrefillStep
from gfxlm.engine.prefix import Prefixes
from gfxlm.engine.request import Choice, Launched, Request, TokenSampler, choices
from gfxlm.engine.scheduler import Scheduler
from gfxlm.engine.speculative import Speculation
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache

Fault = tuple[str, Exception | None]


class Lifecycle:
    """How requests get slots of one engine and leave them, at their ends or because something failed.

    All that goes by slots is prepared for a request, and cleared of it whatever else may fail.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: Cache,
        scheduler: Scheduler,
        sampler: TokenSampler,
        constraints: Constraints,
        prefill_step: PrefillStep,
        *,
        eos_token_ids: Collection[int],
        owns_cache: bool,
        prefixes: Prefixes | None = None,
        drafter: Drafter | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._model, self._cache, self._owns_cache = model, cache, owns_cache
        self._scheduler, self._sampler, self._constraints = scheduler, sampler, constraints
        self._prefill_step, self._prefixes = prefill_step, prefixes
        self._drafter, self._speculation = drafter, speculation
        self._eos_token_ids = eos_token_ids
        self.launched: Launched | None = None  # the step under way, which gives the model its requests' last tokens
        self.at_work: Sequence[Request] = ()  # whom to blame for what is raised
        self.served: list[Request] = []  # to whom something was handed in this step
        self._clearing: dict[int, ExitStack] = {}  # by slot, what is to be cleared, whatever else may fail

    def admit(self) -> list[Request]:
        """Let requests start for which there is a slot and room; returns those that failed at once."""
        started = []
        while (request := self._scheduler.start()) is not None:
            started.append(request)
            with self.own_work(request):
                self._begin(request)
        return [request for request in started if request.error is not None]

    def advance(self) -> None:
        """Let those whose prompts are being fed go on behind what the prefix cache knows by now."""
        for request in [request for request in self._scheduler.running if request.feeding]:
            if self._prefixes is not None:
                with self.own_work(request):
                    self._prefixes.advance(request)

    def accept(self, request: Request, choice: Choice, ends: bool) -> None:
        """Hand a request its next token; `ends` says that it can have no more."""
        self.served.append(request)
        with self.own_work(request):
            self._accept(request, choice, ends)

    def read(self, launched: Launched) -> list[Request]:
        """Hand out a step's tokens to those of its requests that still run."""
        assert launched.sampled is not None
        self.at_work = list(launched.ends)
        running = []
        for (request, ends), choice in zip(launched.ends.items(), choices(launched.sampled.read()), strict=True):
            if request.finish_reason is None:
                running.append(request)
                self.accept(request, choice, ends)
        return running

    def go_on(self, request: Request) -> Request:
        """Let a request go on by a token that the model has seen already, as a draft."""
        if request.replay:
            request.replay += 1
        else:
            self._cache.lengths[request.slot] += 1
        self.take(request)
        return request

    def take(self, request: Request) -> None:
        """Hand a request the next token of its queue."""
        choice = request.queue.popleft()
        self.accept(request, choice, self.at_limit(request, len(request.tokens) + 1))

    def at_limit(self, request: Request, tokens: int) -> bool:
        """Whether a request that has so many tokens, the last of them not yet in the cache, can have no more."""
        positions = self._cache.lengths[request.slot] + request.replay
        return tokens == request.params.max_tokens or positions == self._cache.max_context

    def release(self, request: Request) -> None:
        """Take a request out, wherever it is, and clear its slot."""
        if request in self._scheduler.waiting:
            self._scheduler.leave(request)
        elif request in self._scheduler.running:
            with self.own_work(request), self._clearing.pop(request.slot):
                self._end(request)

    def end_late(self) -> list[Request]:
        """End those that have had their time."""
        late = self._scheduler.expired()
        for request in late:
            request.timed_out = True
            self.fail(request, f"the time limit of {request.timeout:g} s has passed")
        return late

    def fail(self, request: Request, reason: str, exception: Exception | None = None) -> None:
        """End a request with an error."""
        request.error, request.exception, request.finish_reason = reason, exception, "error"
        self.release(request)

    @contextmanager
    def own_work(self, request: Request) -> Iterator[None]:
        """What is raised here ends this request alone."""
        try:
            yield
        except Exception as error:
            fault = self.fault(error)
            self.fail(request, *fault)

    def fault(self, error: Exception) -> Fault:
        """What there is to say of an exception, and the exception itself unless it holds memory that is short."""
        if is_out_of_memory(error):
            return explain_out_of_memory(error, self._model, self._cache), None
        return f"{type(error).__name__}: {error}", error

    def recover(self, fault: Fault) -> list[Request]:
        """After a step that raised, end those it was for; those of whom not all is known any more begin again.

        Prompts that were fed together are fed again one by one, to see which one it was. Returns whom the step was of
        use to before, and who has failed.
        """
        running = self._scheduler.running
        at_work = [request for request in self.at_work if request in running]
        together = [request for request in at_work if not (request.tokens or request.alone)]
        if len(at_work) < 2 or not self._owns_cache:
            together = []
        for request in together:
            request.alone = True
        # Where nobody is known to be at work, everybody is.
        failed = [request for request in at_work or list(running) if request not in together]
        served = [request for request in self.served if request not in failed]
        for request in failed:
            self.fail(request, *fault)
        # Their first tokens were being sampled, and are lost.
        others = [request for request in running if not (request.tokens or request.feeding or request in together)]
        for request in [*together, *others]:
            with self._clearing.pop(request.slot):
                request.prefilled = request.cached = 0
                request.published.clear()
        self._scheduler.put_back([*together, *others])
        return [*served, *failed]

    def _begin(self, request: Request) -> None:
        slot = request.slot
        clearing = self._clearing[slot] = ExitStack()
        clearing.callback(self._leave, request)
        if request.prefix is not None:
            self._cache.copy_slot(slot, request.prefix, 0)
        if self._prefixes is not None:
            self._prefixes.begin(request)
        self._sampler.set(slot, request.params, request.prompt)
        clearing.callback(self._sampler.clear, slot)
        clearing.callback(self._constraints.end, slot)
        self._constraints.begin(slot, request.params.grammar)
        if self._drafter is not None:
            self._drafter.begin(slot, [*request.cached_tokens, *request.prompt])
            clearing.callback(self._drafter.end, slot)

    def _accept(self, request: Request, choice: Choice, ends: bool) -> None:
        token, params = choice.token, request.params
        if (reason := self._constraints.error(request.slot)) is not None:
            self.fail(request, reason)
            return
        if token < 0:
            place = first_nan_module(self._model, [*request.prompt, *request.tokens])
            self.fail(request, f"the logits are not finite; the first bad values come out of {place}")
            return
        request.tokens.append(token)
        request.from_draft = choice.from_draft
        if self._drafter is not None:
            self._drafter.extend(request.slot, token)
        request.logprobs = choice.logprobs if params.logprobs else None
        if params.top_logprobs is not None and choice.top is not None:
            request.logprob = token_logprob(choice.top, token, params.top_logprobs)
        if token in self._eos_token_ids:
            request.finish_reason = "stop"
        elif ends:
            request.finish_reason = "length"
        if request.finish_reason is not None:
            self.release(request)
        else:
            self._constraints.accept(request.slot, token)

    def _end(self, request: Request) -> None:
        if self._speculation is not None and request.queue:
            self._speculation.take_back(request)
            request.queue.clear()
        if request.error is None:
            self._hand_over(request)
        elif self._prefixes is not None and not request.timed_out:
            self._prefixes.forget(request)

    def _hand_over(self, request: Request) -> None:
        """Leave the cache as whoever goes on from it expects it: with the last token in it."""
        slot, limit = request.slot, self._cache.max_context
        continued = request.keep_cache or not self._owns_cache
        if continued and request.tokens and not self._ahead(request):
            pending = request.pending[: limit - self._cache.lengths[slot]]
            if pending and self._cache.reserve(slot, self._cache.lengths[slot] + len(pending)):
                self._prefill_step.run(pending, [slot], [len(pending)])
        if request.keep_cache:
            request.cache = self._model.make_cache(1, limit)
            request.cache.copy_slot(0, self._cache, slot)
        if self._prefixes is not None:
            self._prefixes.leave(request)

    def _ahead(self, request: Request) -> bool:
        return self.launched is not None and request in self.launched.ends

    def _leave(self, request: Request) -> None:
        self._scheduler.leave(request)
        if self._owns_cache:
            self._cache.release(request.slot)
