"""The pieces of several texts as one stream, without a worker."""

import asyncio
from typing import Any

import pytest

from gfxlm.engine.params import SamplingParams
from gfxlm.server.errors import ApiError
from gfxlm.server.generation import Generation, Job, Piece, merged


def begun(number: int) -> tuple[list[Job], list[Generation]]:
    """Jobs, in whose place a test says what the engine has to say, and their generations."""
    stream: Any = None
    jobs = [Job([1], SamplingParams(), None, stream) for _ in range(number)]
    return jobs, [Generation("m", job, lambda _: None) for job in jobs]


def test_nobody_waits_for_one_that_has_much_to_say() -> None:
    async def order() -> list[int]:
        jobs, generations = begun(2)
        for job in jobs:
            job.put(Piece("a"))
        seen = []
        async for i, _ in merged(generations):
            seen.append(i)
            if len(seen) == 6:
                for job in jobs:
                    job.put(Piece("", finish_reason="stop"))
            elif len(seen) < 6:
                jobs[0].put(Piece("more"))
        return seen

    assert asyncio.run(order()) == [0, 1, 0, 0, 0, 0, 1, 0]


def test_what_comes_while_nobody_asks_is_not_forgotten() -> None:
    async def texts() -> list[tuple[int, str]]:
        jobs, generations = begun(3)
        jobs[1].put(Piece("a"))
        jobs[1].put(Piece("b", finish_reason="stop"))
        seen = []
        async for i, piece in merged(generations):
            seen.append((i, piece.text))
            if i == 1:
                jobs[2].put(Piece("c"))
                jobs[0].put(Piece("d", finish_reason="length"))
                jobs[2].put(Piece("e", finish_reason="length"))
        return seen

    assert asyncio.run(asyncio.wait_for(texts(), 5)) == [(1, "ab"), (2, "ce"), (0, "d")]


def test_an_error_comes_behind_the_pieces_before_it() -> None:
    async def run() -> None:
        jobs, generations = begun(2)
        jobs[0].put(Piece("a"))
        jobs[0].put(ApiError(500, "broken"))
        coming = merged(generations)
        assert (await anext(coming))[1].text == "a"
        with pytest.raises(ApiError, match="broken"):
            await asyncio.wait_for(anext(coming), 5)
        assert jobs[1].ended  # who asked for both gets neither

    asyncio.run(run())


def test_one_that_is_cancelled_holds_nobody_up() -> None:
    async def run() -> list[int]:
        jobs, generations = begun(2)
        asyncio.get_running_loop().call_later(0.01, generations[0].cancel)
        asyncio.get_running_loop().call_later(0.02, jobs[1].put, Piece("", finish_reason="stop"))
        return [i async for i, _ in merged(generations)]

    assert asyncio.run(asyncio.wait_for(run(), 5)) == [1]
