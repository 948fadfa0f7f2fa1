"""The worker's promises: every text is what it is alone, and nobody waits for one who does not read."""

import asyncio
import gc
import threading
import time
from typing import Any

import pytest
import torch

from gfxlm import generate
from gfxlm.engine.params import SamplingParams
from gfxlm.server.errors import ApiError
from gfxlm.server.generation import Piece, joined
from gfxlm.server.metrics import Metrics
from gfxlm.server.worker import Worker
from tests.server.conftest import Loaded
from tests.server.workers import LONG, PENALTY, PROMPT, SHORT, run_with, text_of, until


def test_many_texts_are_what_each_is_alone(builtin: Loaded) -> None:
    prompts = [[17, 300 + i] for i in range(12)]
    expected = [generate(*builtin, prompt, max_tokens=8) for prompt in prompts]

    async def test(worker: Worker) -> None:
        texts = await asyncio.gather(*(text_of(worker.generate(prompt, SHORT)) for prompt in prompts))
        assert texts == expected

    run_with(builtin, test)


@pytest.mark.parametrize("end", ["cancel", "drop"])
def test_a_cancelled_request_leaves_within_a_step(builtin: Loaded, end: str) -> None:
    async def test(worker: Worker) -> None:
        generation = worker.generate(PROMPT, LONG)
        await anext(generation)
        assert worker.live == 1
        steps = worker.steps
        if end == "cancel":
            generation.cancel()
        else:
            del generation
            gc.collect()
        await until(lambda: not worker.live)
        assert worker.steps <= steps + 8  # those that ran before we came to say it
        await until(lambda: worker.running == 0)
        at_end = worker.steps
        await asyncio.sleep(0.05)
        assert worker.steps == at_end

    run_with(builtin, test)


def test_one_that_waits_can_be_cancelled(builtin: Loaded) -> None:
    async def test(worker: Worker) -> None:
        first = worker.generate(PROMPT, LONG)
        await anext(first)
        second = worker.generate(PROMPT, SHORT)
        await until(lambda: worker.waiting == 1)
        second.cancel()
        await until(lambda: worker.live == 1)
        assert [piece async for piece in second] == []
        third = asyncio.ensure_future(text_of(worker.generate(PROMPT, SHORT)))
        await asyncio.sleep(0.02)
        assert not third.done()
        first.cancel()
        assert await third == generate(*builtin, PROMPT, max_tokens=8)

    run_with(builtin, test, max_concurrency=1)


def test_a_full_queue_refuses_and_says_when_to_come_again(builtin: Loaded) -> None:
    async def test(worker: Worker) -> None:
        kept = [worker.generate(PROMPT, LONG) for _ in range(3)]
        with pytest.raises(ApiError) as caught:
            worker.generate(PROMPT, SHORT)
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert caught.value.headers["Retry-After"] == "1"
        for generation in kept:
            generation.cancel()
        await until(lambda: not worker.live)
        assert await text_of(worker.generate(PROMPT, SHORT))

    run_with(builtin, test, max_concurrency=2, max_queue=1)


@pytest.mark.parametrize("waits", [False, True])
def test_a_deadline_ends_who_runs_and_who_waits(builtin: Loaded, waits: bool) -> None:
    async def test(worker: Worker) -> None:
        first = worker.generate(PROMPT, LONG) if waits else None
        generation = worker.generate(PROMPT, LONG, timeout=0.05)
        with pytest.raises(ApiError) as caught:
            await text_of(generation)
        assert caught.value.status == 504
        assert "0.05 s" in caught.value.message
        if first is not None:
            first.cancel()

    run_with(builtin, test, max_concurrency=1)


def test_who_does_not_read_slows_nobody_and_loses_nothing(builtin: Loaded) -> None:
    expected = generate(*builtin, PROMPT, max_tokens=100, logit_bias={0: float("-inf")})
    params = SamplingParams(max_tokens=100, logit_bias={0: float("-inf")}, **PENALTY)

    async def test(worker: Worker) -> None:
        slow = worker.generate(PROMPT, params)
        quick = await text_of(worker.generate(PROMPT, params))
        await until(lambda: not worker.live)
        assert slow.generated_tokens == 100  # nobody has asked for any of them
        pieces = [piece async for piece in slow]
        assert len(pieces) == 1
        assert len(pieces[0].tokens) == 100
        assert pieces[0].text == quick == expected
        assert pieces[0].finish_reason == "length"

    run_with(builtin, test)


def test_a_stop_string_is_named_and_nothing_comes_after_it(builtin: Loaded) -> None:
    text = generate(*builtin, PROMPT, max_tokens=30)
    stop = text[10:14]

    async def test(worker: Worker) -> None:
        params = SamplingParams(max_tokens=30, stop=[stop, "§"], top_logprobs=0, **PENALTY)
        last = joined([piece async for piece in worker.generate(PROMPT, params)])
        assert last.text == text[: text.index(stop)]
        assert (last.finish_reason, last.stop) == ("stop", stop)
        assert [logprob.token for logprob in last.logprobs] == list(last.tokens)

    run_with(builtin, test)


def test_an_idle_worker_rests(builtin: Loaded) -> None:
    async def test(worker: Worker) -> None:
        await text_of(worker.generate(PROMPT, SHORT))
        await until(lambda: not worker.live)
        before = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - before < 0.1

    run_with(builtin, test)


def test_the_loop_is_woken_once_a_step(builtin: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    wakes = 0

    async def test(worker: Worker) -> None:
        nonlocal wakes
        loop = asyncio.get_running_loop()
        original = loop.call_soon_threadsafe

        def counted(*args: Any, **options: Any) -> asyncio.Handle:
            nonlocal wakes
            if threading.current_thread().name.startswith("engine"):
                wakes += 1
            return original(*args, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        before = worker.steps
        await asyncio.gather(*(text_of(worker.generate(PROMPT, SHORT)) for _ in range(16)))
        assert 8 <= wakes <= worker.steps - before

    run_with(builtin, test)


def test_counts_are_told_and_end_at_zero(builtin: Loaded) -> None:
    metrics = Metrics()

    def value(name: str, **labels: str) -> float:
        return metrics.registry.get_sample_value(f"vllm:{name}", {"model_name": "builtin", **labels}) or 0.0

    async def test(worker: Worker) -> None:
        await text_of(worker.generate(PROMPT, SHORT))
        running = worker.generate(PROMPT, LONG)
        await anext(running)
        await until(lambda: value("num_requests_running") == 1)
        assert value("kv_cache_usage_perc") > 0
        running.cancel()
        await until(lambda: value("num_requests_running") == 0)
        assert value("num_requests_waiting") == 0
        assert value("kv_cache_usage_perc") == 0
        assert value("request_success_total", finished_reason="length") == 1
        assert value("request_success_total", finished_reason="abort") == 1
        assert value("time_to_first_token_seconds_count") == 2
        assert value("prompt_tokens_total") == 2 * len(PROMPT)

    run_with(builtin, test, metrics=metrics.model("builtin"))


def test_a_prompt_that_was_read_before_is_not_read_again(builtin: Loaded) -> None:
    prompt = list(range(100, 900))

    async def test(worker: Worker) -> None:
        first = worker.generate(prompt, SHORT)
        text = await text_of(first)
        again = worker.generate(prompt, SHORT)
        assert await text_of(again) == text
        assert first.cached_tokens == 0
        assert again.cached_tokens > 400
        assert again.timings["cache_n"] == again.cached_tokens
        assert again.timings["prompt_n"] == 800 - again.cached_tokens

    run_with(builtin, test)


def test_joined_pieces_are_one() -> None:
    pieces = [Piece("a", (1,)), Piece("", (2,)), Piece("b", (3,), finish_reason="stop", stop="c")]
    assert joined(pieces) == Piece("ab", (1, 2, 3), (), "stop", "c")


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_hidden_states_pooled(builtin: Loaded, pooling: str) -> None:
    model = builtin[0]
    prompts = [PROMPT, [5], list(range(50, 90))]

    def expected(prompt: list[int]) -> torch.Tensor:
        from gfxlm.ops.ragged import ragged

        positions, slots = ragged([0], [len(prompt)], [0])
        with torch.inference_mode():
            cache = model.make_cache(1, len(prompt))
            hidden = model.forward(torch.tensor(prompt), positions, slots, cache).double()
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        return pooled / pooled.norm()

    async def test(worker: Worker) -> None:
        running = worker.generate(PROMPT, SHORT)
        vectors = await worker.embed(prompts, pooling=pooling)  # type: ignore[arg-type]
        for prompt, vector in zip(prompts, vectors, strict=True):
            torch.testing.assert_close(torch.tensor(vector).double(), expected(prompt), atol=2e-3, rtol=0)
        assert await text_of(running) == generate(*builtin, PROMPT, max_tokens=8)

    run_with(builtin, test)
