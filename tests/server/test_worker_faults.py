"""What fails or ends under a worker: no request is lost, and none hurts another."""

import asyncio
import weakref

import pytest
import torch

from gfxlm import generate, load
from gfxlm.engine.engine import Engine
from gfxlm.engine.request import Request
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.models.base import CausalLM
from gfxlm.server.errors import ApiError
from gfxlm.server.generation import merged
from gfxlm.server.opening import Opening
from gfxlm.server.worker import Worker
from tests.server.conftest import Loaded, alone
from tests.server.workers import LONG, PROMPT, SHORT, run_with, text_of, until


class Faulty:
    """An engine's step that raises when it is told to."""

    def __init__(self) -> None:
        self.faults = 0
        self.engines: list[Engine] = []
        self.closed: list[Engine] = []

    def make(self, model: CausalLM, tokenizer: Tokenizer) -> Engine:
        engine = Opening().make_engine(model, tokenizer)
        step = engine.step

        def faulty() -> list[Request]:
            if self.faults and engine.running:
                self.faults -= 1
                raise ZeroDivisionError("injected")
            return step()

        close = engine.close
        engine.close = lambda: self.closed.append(engine) or close()  # type: ignore[method-assign,func-returns-value]
        engine.step = faulty  # type: ignore[method-assign]
        self.engines.append(engine)
        return engine


def test_an_engine_that_breaks_fails_who_runs_and_begins_anew(builtin: Loaded) -> None:
    faulty = Faulty()

    async def test(worker: Worker) -> None:
        running = [worker.generate(PROMPT, LONG) for _ in range(3)]
        await anext(running[0])
        faulty.faults = 1
        for generation in running:
            with pytest.raises(ApiError) as caught:
                await text_of(generation)
            assert caught.value.status == 500
            assert "ZeroDivisionError" in caught.value.message
        await until(lambda: len(faulty.engines) == 2 and worker.state == "ready")
        assert faulty.closed == faulty.engines[:1]
        assert await text_of(worker.generate(PROMPT, SHORT)) == generate(*builtin, PROMPT, max_tokens=8)

    run_with(builtin, test, make_engine=faulty.make)
    assert faulty.closed == faulty.engines


def test_an_engine_that_breaks_again_and_again_is_given_up(builtin: Loaded) -> None:
    faulty = Faulty()

    async def test(worker: Worker) -> None:
        for _ in range(3):
            generation = worker.generate(PROMPT, LONG)
            await anext(generation)
            faulty.faults = 1
            with pytest.raises(ApiError, match="engine failed"):
                await text_of(generation)
            await until(lambda: worker.state != "loading")
        await until(worker.failed.done)
        assert worker.state == "dead"
        assert worker.live == 0
        with pytest.raises(ApiError) as caught:
            worker.generate(PROMPT, SHORT)
        assert caught.value.status == 503

    run_with(builtin, test, make_engine=faulty.make)


def test_a_lost_device_ends_the_worker_at_once(builtin: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(requests: list[Request], device: torch.device) -> None:
        raise torch.AcceleratorError("an illegal memory access")

    async def test(worker: Worker) -> None:
        running, waiting = worker.generate(PROMPT, LONG), worker.generate(PROMPT, LONG)
        monkeypatch.setattr("gfxlm.server.worker.check_device", check)
        for generation in (running, waiting):
            with pytest.raises(ApiError) as caught:
                await text_of(generation)
            assert caught.value.status == 503
        await asyncio.wait_for(asyncio.wrap_future(worker.failed), 5)
        assert worker.state == "dead"
        assert worker.live == 0

    run_with(builtin, test, max_concurrency=1)


def test_a_text_that_cannot_be_decoded_fails_alone(builtin: Loaded) -> None:
    async def test(worker: Worker) -> None:
        good = worker.generate(PROMPT, SHORT)
        bad = worker.generate(PROMPT, LONG)
        bad._job.stream.add = lambda *_, **__: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        with pytest.raises(ApiError) as caught:
            await text_of(bad)
        assert caught.value.status == 500
        assert await text_of(good) == generate(*builtin, PROMPT, max_tokens=8)

    run_with(builtin, test)


def test_closing_ends_everything_that_runs_or_waits(builtin: Loaded) -> None:
    async def test(worker: Worker) -> None:
        generations = [worker.generate(PROMPT, LONG) for _ in range(4)]
        embedding = asyncio.ensure_future(worker.embed([PROMPT] * 200, pooling="mean"))
        await anext(generations[0])
        await worker.close()
        assert worker.state == "closed"
        for generation in generations:
            with pytest.raises(ApiError) as caught:
                await text_of(generation)
            assert caught.value.status == 503
        with pytest.raises(ApiError):
            await embedding
        assert worker.live == 0
        with pytest.raises(ApiError):
            worker.generate(PROMPT, SHORT)

    run_with(builtin, test, max_concurrency=2)


def test_closing_frees_the_model() -> None:
    models: list[weakref.ref[CausalLM]] = []

    def fresh() -> Loaded:
        loaded = alone(load("builtin"))
        models.append(weakref.ref(loaded[0]))
        return loaded

    async def whole() -> None:
        worker = Worker("builtin", fresh, Opening(max_concurrency=2).make_engine, capacity=2)
        worker.start()
        await worker.ready()
        generation = worker.generate(PROMPT, LONG)
        await anext(generation)
        await worker.close()
        with pytest.raises(ApiError):
            await text_of(generation)
        assert models[0]() is None

    asyncio.run(whole())


def test_requests_and_closing_at_the_same_time_lose_nobody(builtin: Loaded) -> None:
    """Whoever got a generation gets an end of it, wherever the worker was when it closed."""

    async def test(worker: Worker) -> None:
        ends: list[int] = []

        async def one() -> None:
            try:
                await text_of(worker.generate(PROMPT, SHORT))
                ends.append(200)
            except ApiError as error:
                ends.append(error.status)

        tasks: list[asyncio.Future[None]] = []
        closing = None
        while len(tasks) < 400:
            tasks.append(asyncio.ensure_future(one()))
            if ends and closing is None:
                closing = asyncio.ensure_future(worker.close())
            await asyncio.sleep(0 if ends else 0.005)
        assert closing is not None
        await asyncio.wait_for(asyncio.gather(closing, *tasks), 20)
        assert len(ends) == 400
        assert set(ends) == {200, 503}

    run_with(builtin, test, max_queue=1000)


def test_merged_closes_all_when_one_fails(builtin: Loaded) -> None:
    async def test(worker: Worker) -> None:
        generations = [worker.generate(PROMPT, LONG), worker.generate(PROMPT, LONG, timeout=0.05)]
        with pytest.raises(ApiError):
            async for _ in merged(generations):
                pass
        await until(lambda: not worker.live)

    run_with(builtin, test)
