"""One model in one thread: requests go in through a queue, their pieces come out, one wake-up of the loop a step."""

import asyncio
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from gfxlm.device.memory import empty_cache
from gfxlm.engine.diagnose import check_device
from gfxlm.engine.embedding import Pooling, embedded
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import check_prompt
from gfxlm.engine.text import TextStream
from gfxlm.errors import UserError
from gfxlm.server.embedding_queue import EmbeddingQueue, Vectors
from gfxlm.server.errors import RETRY_SECONDS, ApiError, busy, invalid
from gfxlm.server.generation import Generation, Job, Piece

if TYPE_CHECKING:
    from gfxlm.engine.engine import Engine
    from gfxlm.engine.grammar import Grammar, GrammarSource
    from gfxlm.engine.request import Request
    from gfxlm.engine.tokenizer import Tokenizer
    from gfxlm.models.base import CausalLM
    from gfxlm.server.metrics import ModelMetrics

log = logging.getLogger("gfxlm.server")

State = Literal["loading", "ready", "dead", "closed"]
# A worker whose engine breaks more often than this many times in so many seconds is given up.
_MOST_FAILURES = 3
_FAILURE_SECONDS = 60.0


class Worker:
    """A model, its tokenizer and its engine, from loading to closing; all of them belong to the worker's thread.

    `load` and `make_engine` are called there. At most `capacity` requests run or wait at the same time.
    Attributes of the model are there once `ready` has returned.
    """

    name: str
    tokenizer: "Tokenizer"
    max_context: int
    vocab_size: int
    hidden_size: int
    generation_config: Mapping[str, Any]

    def __init__(
        self,
        name: str,
        load: "Callable[[], tuple[CausalLM, Tokenizer]]",
        make_engine: "Callable[[CausalLM, Tokenizer], Engine]",
        *,
        capacity: int,
        metrics: "ModelMetrics | None" = None,
    ) -> None:
        self.name = name
        self._load, self._make_engine = load, make_engine
        self._capacity = capacity
        self._metrics = metrics
        self.state: State = "loading"
        self._grammars: GrammarSource | None = None
        self._loaded: Future[None] = Future()
        self.failed: Future[None] = Future()  # done once the engine has failed for good, and everybody was told
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._jobs: dict[Request, Job] = {}
        self._embeddings = EmbeddingQueue()
        self._failures: deque[float] = deque(maxlen=_MOST_FAILURES)
        # Each is counted in one thread: the loop's, and the engine's.
        self._submitted = self._ended = 0
        # The thread writes them after each step, anybody reads them.
        self.steps = self.running = 0
        self.cache_usage = 0.0
        self._thread = threading.Thread(target=self._run, name=f"engine of {name}", daemon=True)

    # What the event loop calls.

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    async def ready(self) -> None:
        """Wait until it is loaded. Raises what loading raised."""
        await asyncio.shield(asyncio.wrap_future(self._loaded))

    @property
    def live(self) -> int:
        """Requests that wait or run."""
        return self._submitted - self._ended

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return max(0, self.live - self.running)

    def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, timeout: float | None = None, min_tokens: int = 0
    ) -> Generation:
        """Queue a prompt. Raises ApiError: 400 for one that cannot be, 429 where too many wait, 503 if closed.

        Stop strings count behind the first `min_tokens` tokens.
        """
        self._check_open()
        self._check_prompt(prompt, "prompt")
        self._check_room()
        job = Job(prompt, params, timeout, TextStream(self.tokenizer, params.stop, min_tokens))
        if self._metrics is not None:
            job.metrics = self._metrics.on_request(len(prompt), params.max_tokens)
        self._submitted += 1
        self._commands.put(partial(self._add, job))
        generation = Generation(self.name, job, lambda job: self._commands.put(partial(self._cancel, job)))
        self._check_open()  # or else nobody may be there who would take it
        return generation

    async def check(self, grammar: "Grammar | None", *, param: str | None = None) -> None:
        """Compile a grammar, not in the engine's thread, since some take a while. ApiError 400, of `param`, if bad."""
        if grammar is None or self._grammars is None:
            return
        try:
            await asyncio.to_thread(self._grammars.check, grammar)
        except UserError as error:
            raise invalid(str(error), param=param) from error

    async def embed(self, prompts: Sequence[Sequence[int]], *, pooling: Pooling) -> Vectors:
        """A vector of length 1 for each prompt. Raises ApiError as `generate` does."""
        self._check_open()
        for prompt in prompts:
            self._check_prompt(prompt, "input")
        self._check_room()
        self._submitted += 1
        result: Future[Vectors] = Future()
        self._commands.put(partial(self._embed, prompts, pooling, result))
        self._check_open()
        return await asyncio.wrap_future(result)

    def cut_off(self, error: ApiError) -> None:
        """End all requests with this error."""
        self._commands.put(partial(self._fail_all, error))

    async def close(self) -> None:
        """End all requests and the thread, and free the model's memory; one that is being loaded ends by itself."""
        if not self._loaded.done():
            return
        self._commands.put(self._close)
        while self._thread.is_alive():
            await asyncio.sleep(0.01)

    def _check_open(self) -> None:
        if self.state == "dead":
            raise ApiError(503, f"the engine of {self.name} has failed; the server's log says why")
        if self.state != "ready":
            raise ApiError(503, f"{self.name} is not loaded; try again", headers={"Retry-After": RETRY_SECONDS})

    def _check_room(self) -> None:
        if self.live >= self._capacity:
            raise busy(f"{self.live} requests run or wait already")

    def _check_prompt(self, prompt: Sequence[int], param: str) -> None:
        try:
            check_prompt(prompt, self.vocab_size, 0, self.max_context)
        except UserError as error:
            code = "context_length_exceeded" if len(prompt) > self.max_context else None
            raise invalid(str(error), param=param, code=code) from error

    # What happens in the worker's thread.

    def _run(self) -> None:
        try:
            self._open()
        except BaseException as error:
            self.state = "dead"
            self._loaded.set_exception(error)
            return
        self.state = "ready"
        self._loaded.set_result(None)
        try:
            while self.state == "ready":
                self._obey()
                if self.state == "ready" and self._engine.busy:
                    self._step()
                if self._embeddings:
                    self._ended += self._embeddings.advance()
                self._observe()
        except BaseException:
            log.exception("the worker of %s has failed", self.name)
            self.state = "dead"
        self._tell_all()
        if self.state == "dead":
            self.failed.set_result(None)
        self._free()

    def _open(self) -> None:
        self._model, self.tokenizer = self._load()
        self.vocab_size = self._model.config.vocab_size
        self.hidden_size = self._model.config.hidden_size
        self.generation_config = self._model.generation_config
        self._start_engine()
        if self._metrics is not None:
            self._metrics.watch(lambda: self.running, lambda: self.waiting, lambda: self.cache_usage)

    def _start_engine(self) -> None:
        self._engine = self._make_engine(self._model, self.tokenizer)
        self._engine.warm_up()
        self.max_context = self._engine.cache.max_context
        self._grammars = self._engine.grammars

    def _observe(self) -> None:
        engine = self._engine
        self.running = engine.running
        self.cache_usage = 1 - engine.free_positions / engine.positions if engine.positions else 0.0

    def _tell_all(self) -> None:
        """That it is over, those too whose requests are in the queue yet."""
        for job in list(self._jobs.values()):
            self._end(job, self._gone())
        with suppress(Empty):
            while True:
                self._commands.get_nowait()()
        self._ended += self._embeddings.fail(self._gone())
        if self._metrics is not None:
            self._metrics.unwatch()
        self.running, self.cache_usage = 0, 0.0

    def _free(self) -> None:
        device = self._model.device
        if "_engine" in self.__dict__:
            with suppress(RuntimeError):  # of a device that has failed
                self._engine.close()
            del self._engine
        del self._model
        gc.collect()
        empty_cache(device)

    def _gone(self) -> ApiError:
        return ApiError(503, f"{self.name} is not served any longer")

    def _close(self) -> None:
        self.state = "closed"

    def _obey(self) -> None:
        """Do what was asked for since the last step; wait for it where there is nothing else to do."""
        if not self._engine.busy and not self._embeddings:
            self._commands.get()()
        while self.state == "ready":
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command()

    def _add(self, job: Job) -> None:
        if job.cancelled:
            return
        if self.state != "ready":
            self._end(job, self._gone())
            return
        try:
            request = self._engine.add(job.prompt, job.params, timeout=job.timeout)
        except UserError as error:
            self._end(job, invalid(str(error)))
        except Exception:
            log.exception("a request was not taken")
            self._end(job, ApiError(500, "the engine could not take the request; the server's log says why"))
        else:
            job.request = request
            self._jobs[request] = job

    def _cancel(self, job: Job) -> None:
        """End a request that nobody waits for any longer, unless it has ended."""
        if job.cancelled:
            return
        job.cancelled = True
        if job.request is not None and self._jobs.pop(job.request, None) is None:
            return  # it has ended
        if job.request is not None:
            self._engine.finish(job.request)
        self._ended += 1
        if job.metrics is not None:
            job.metrics.on_finish("abort")

    def _step(self) -> None:
        produced, broken = self._stepped()
        if broken is not None:
            self._recover(broken)
            return
        self.steps += 1
        check_device(produced, self._model.device)
        self._send([(job, self._piece(request, job)) for request in produced if (job := self._jobs.get(request))])

    def _stepped(self) -> "tuple[list[Request], str | None]":
        """The requests that a step was of use to, or the exception that came of it, by name: itself it holds memory."""
        try:
            return self._engine.step(), None
        except Exception as error:
            log.exception("the engine of %s has failed", self.name)
            return [], type(error).__name__

    def _piece(self, request: "Request", job: Job) -> Piece | ApiError:
        """What a step has done for a request; one that has ended is let go."""
        reason = request.finish_reason
        if reason == "error":
            return self._ended_with(job, _failure(request))
        token = request.tokens[-1]
        job.count_token()
        self._count(request, job)
        try:
            text, stopped = job.stream.add(token, last=reason is not None)
        except Exception:
            log.exception("a text could not be decoded")
            self._engine.finish(request)
            return self._ended_with(job, ApiError(500, "the text could not be decoded; the server's log says why"))
        if stopped and reason is None:
            self._engine.finish(request)
        shown = () if token in self.tokenizer.eos_token_ids else (token,)
        logprobs = (request.logprob,) if shown and request.logprob is not None else ()
        if stopped:
            reason = "stop"
        piece = Piece(text, shown, logprobs, reason, job.stream.stop if stopped else None)
        return piece if reason is None else self._ended_with(job, piece)

    def _count(self, request: "Request", job: Job) -> None:
        if job.metrics is not None:
            if job.generated == 1:
                job.metrics.on_started(request.cached, request.started)
            job.metrics.on_tokens()

    def _ended_with(self, job: Job, item: Piece | ApiError) -> Piece | ApiError:
        if job.request is not None:
            del self._jobs[job.request]
        self._ended += 1
        if job.metrics is not None:
            job.metrics.on_finish("error" if isinstance(item, ApiError) else item.finish_reason or "stop")
        return item

    def _end(self, job: Job, error: ApiError) -> None:
        job.cancelled = True
        self._send([(job, self._ended_with(job, error))])

    def _send(self, items: list[tuple[Job, Piece | ApiError]]) -> None:
        """Wake each loop that waits for any of these, once."""
        for loop in {job.loop for job, _ in items}:
            try:
                loop.call_soon_threadsafe(_deliver, [(job, item) for job, item in items if job.loop is loop])
            except RuntimeError:  # the loop is closed
                for job, _ in items:
                    self._cancel(job)

    def _fail_all(self, error: ApiError) -> None:
        for job in list(self._jobs.values()):
            assert job.request is not None
            self._engine.finish(job.request)
            self._end(job, error)
        self._ended += self._embeddings.fail(error)

    def _recover(self, error: str) -> None:
        """The engine itself has broken: what runs has failed, and a new engine begins, unless this goes on and on."""
        self.state = "loading"
        failure = ApiError(500, f"the engine failed: {error}; the server's log says more")
        for job in list(self._jobs.values()):
            self._end(job, failure)
        now = time.monotonic()
        self._failures.append(now)
        if len(self._failures) == _MOST_FAILURES and now - self._failures[0] < _FAILURE_SECONDS:
            raise RuntimeError(f"the engine failed {_MOST_FAILURES} times in {_FAILURE_SECONDS:g} s")
        self._engine.close()
        del self._engine
        gc.collect()
        empty_cache(self._model.device)
        self._start_engine()
        self.state = "ready"
        log.warning("the engine of %s has been started again", self.name)

    def _embed(self, prompts: Sequence[Sequence[int]], pooling: Pooling, result: Future[Vectors]) -> None:
        self._embeddings.add(embedded(self._model, prompts, pooling), result)


def _failure(request: "Request") -> ApiError:
    """Why the engine ended a request: its time was up, or what it asked for cannot be, or something is broken."""
    if isinstance(request.exception, UserError):
        return invalid(str(request.exception))
    return ApiError(504 if request.timed_out else 500, request.error or "the request failed")


def _deliver(items: list[tuple[Job, Piece | ApiError]]) -> None:
    for job, item in items:
        job.put(item)
