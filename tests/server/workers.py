"""A worker over the built-in model, without HTTP."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from gfxlm.engine.engine import Engine
from gfxlm.engine.params import SamplingParams
from gfxlm.server.generation import Generation, joined
from gfxlm.server.opening import Opening
from gfxlm.server.worker import Worker
from tests.server.conftest import Loaded, alone

PROMPT = [17, 300, 41]
PENALTY = {"repetition_penalty": 1.15}  # what the model's generation_config.json says
LONG = SamplingParams(max_tokens=400, logit_bias={0: float("-inf")})
SHORT = SamplingParams(max_tokens=8, **PENALTY)


async def text_of(generation: Generation) -> str:
    return joined([piece async for piece in generation]).text


def run_with(
    builtin: Loaded,
    test: Callable[[Worker], Awaitable[None]],
    *,
    make_engine: Callable[..., Engine] | None = None,
    max_concurrency: int = 32,
    max_queue: int = 256,
    **options: Any,
) -> None:
    """Run a test over a worker, and see at its end that nobody is left in the engine."""

    async def whole() -> None:
        opening, capacity = Opening(max_concurrency=max_concurrency), max_concurrency + max_queue
        make = make_engine or opening.make_engine
        worker = Worker("builtin", lambda: alone(builtin), make, capacity=capacity, **options)
        worker.start()
        await worker.ready()
        try:
            await test(worker)
            if worker.state == "ready":
                await until(lambda: not worker.live)
                await until(lambda: worker.running == 0)
        finally:
            await worker.close()

    asyncio.run(whole())


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.002)
