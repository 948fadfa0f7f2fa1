"""Which models there are, which of them are in memory, and who waits for one that is not."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gfxlm.server.errors import ApiError, busy
from gfxlm.server.settings import Settings
from gfxlm.server.worker import Worker

if TYPE_CHECKING:
    from gfxlm.engine.engine import Engine
    from gfxlm.engine.tokenizer import Tokenizer
    from gfxlm.models.base import CausalLM
    from gfxlm.server.metrics import Metrics

log = logging.getLogger("gfxlm.server")

Health = Literal["ok", "loading", "error"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that can be asked for: by its `name`, or by one of the `aliases`. The functions are the worker's."""

    name: str
    aliases: frozenset[str] = frozenset()
    load: "Callable[[], tuple[CausalLM, Tokenizer]]"
    make_engine: "Callable[[CausalLM, Tokenizer], Engine]"


class Models:
    """Up to `resident` models in memory at a time; the one that was asked for least lately makes room for another.

    A model is in use as long as the task that asked for it lives, which is a request until its last byte.
    """

    def __init__(
        self, specs: Sequence[ModelSpec], settings: Settings, metrics: "Metrics | None" = None, *, resident: int = 1
    ) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self._default = specs[0].name
        self._settings, self._metrics, self._resident = settings, metrics, resident
        self._workers: dict[str, Worker] = {}  # the one asked for least lately first
        self._uses: dict[str, int] = dict.fromkeys(self.specs, 0)
        self._unused = asyncio.Condition()
        self._loading = asyncio.Lock()
        self._making_room = False
        self._queued = 0
        self._stopped = asyncio.Event()
        self.failed = asyncio.Event()  # set once an engine has failed for good
        self.abandoned = False  # whether a model was still being loaded at the end
        self.created = int(time.time())

    def start(self) -> None:
        """Begin to load the first model."""
        self._begin(self._default)

    async def first(self) -> str:
        """The name of the first model, once it is loaded. Raises what loading raised."""
        while self._default not in self._workers:  # until the application has started
            await asyncio.sleep(0.01)
        await self._workers[self._default].ready()
        return self._default

    async def get(self, name: str | None) -> Worker:
        """The model of that name, the first one where there is none; loaded, and not unloaded before this task ends.

        ApiError: 404 for an unknown name, 429 where too many wait, 503 while the server starts or ends, 504 where a
        model did not come in time.
        """
        known = self.resolve(name)
        self._check_open()
        worker = self._workers.get(known)
        if worker is None or worker.state != "ready" or self._making_room:
            worker = await self._wait_for(known)
        self._use(known)
        return worker

    @property
    def loaded(self) -> dict[str, Worker]:
        """Models in memory, by name."""
        return {name: worker for name, worker in self._workers.items() if worker.state == "ready"}

    @property
    def health(self) -> Health:
        """Whether requests can be answered."""
        states = [worker.state for worker in self._workers.values()]
        if "dead" in states:
            return "error"
        return "ok" if self._queued or "ready" in states else "loading"

    def stop(self) -> None:
        """Take no more requests; who waits for a model that is not in memory is refused."""
        self._stopped.set()

    def cut_off(self, error: ApiError) -> None:
        """End all requests with this error."""
        self.stop()
        for worker in self._workers.values():
            worker.cut_off(error)

    async def close(self) -> None:
        """End all requests, and free all memory."""
        self.stop()
        for name in list(self._workers):
            worker = self._workers.pop(name)
            await worker.close()
            self.abandoned = self.abandoned or worker.state == "loading"

    def resolve(self, name: str | None) -> str:
        """The name of the model that is meant. ApiError 404 where there is none."""
        if name in (None, "", "default"):
            return self._default
        for spec in self.specs.values():
            if name == spec.name or name in spec.aliases:
                return spec.name
        raise ApiError(
            404,
            f"the model {name!r} does not exist; there is {', '.join(self.specs)}",
            param="model",
            code="model_not_found",
        )

    def _use(self, name: str) -> None:
        self._workers[name] = self._workers.pop(name)
        self._uses[name] += 1
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self._let_go(name))

    def _let_go(self, name: str) -> None:
        self._uses[name] -= 1
        if not self._uses[name] and self._making_room:
            self._notifying = asyncio.ensure_future(self._notify())  # held, or it might be collected

    async def _notify(self) -> None:
        async with self._unused:
            self._unused.notify_all()

    async def _wait_for(self, name: str) -> Worker:
        """In turn: those who came for a model that is in memory too, so that all get theirs in the end."""
        if self._queued >= self._settings.max_queue:
            raise busy(f"{self._queued} requests wait for a model already")
        self._queued += 1
        try:
            async with asyncio.timeout(self._settings.request_timeout), self._loading:
                worker = self._workers.get(name)
                if worker is None:
                    await self._make_room()
                    self._check_open()
                    worker = self._begin(name)
                await self._ready(worker)
                return worker
        except TimeoutError as error:
            raise ApiError(504, f"{name} was not loaded within {self._settings.request_timeout:g} s") from error
        finally:
            self._queued -= 1

    async def _make_room(self) -> None:
        self._making_room = True
        try:
            while len(self._workers) >= self._resident:
                async with self._unused:
                    await self._unused.wait_for(lambda: any(not self._uses[name] for name in self._workers))
                oldest = next(name for name in self._workers if not self._uses[name])
                log.info("unloading %s", oldest)
                await self._workers.pop(oldest).close()
        finally:
            self._making_room = False

    async def _ready(self, worker: Worker) -> None:
        loading = asyncio.ensure_future(worker.ready())
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
            self._check_open()
            loading.result()
        except ApiError:
            raise
        except Exception as error:
            if self._workers.get(worker.name) is worker:
                del self._workers[worker.name]
            raise ApiError(503, f"{worker.name} could not be loaded: {error}", code="model_not_loaded") from error
        finally:
            loading.cancel()
            stopped.cancel()

    def _check_open(self) -> None:
        if self._stopped.is_set():
            raise ApiError(503, "the server is shutting down")

    def _begin(self, name: str) -> Worker:
        spec = self.specs[name]
        log.info("loading %s", name)
        worker = self._workers[name] = Worker(
            name,
            spec.load,
            spec.make_engine,
            capacity=self._settings.capacity,
            metrics=None if self._metrics is None else self._metrics.model(name),
        )
        loop = asyncio.get_running_loop()
        worker.failed.add_done_callback(lambda _: loop.call_soon_threadsafe(self.failed.set))
        worker.start()
        return worker
