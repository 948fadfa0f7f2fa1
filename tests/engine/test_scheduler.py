"""Who waits, who runs, and what a step feeds: order, limits, deadlines, shares."""

import time
from itertools import pairwise

import pytest
import torch

from gfxlm.engine import engine as engines
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.engine.scheduler import _shares
from gfxlm.errors import BusyError
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import RecurrentCache
from tests.engine.serving import finish


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load("builtin", device="cpu", dtype=torch.float32)[0]


def engine_for(model: CausalLM, *, slots: int = 2, step: int = 32, overlap: bool = False, **more) -> Engine:  # type: ignore[no-untyped-def]
    return Engine(model, max_batch=slots, max_context=512, prefill_step_size=step, overlap=overlap, **more)


def add(engine: Engine, length: int, most: int = 4, timeout: float | None = None) -> Request:
    return engine.add([i % 400 for i in range(length)], SamplingParams(max_tokens=most), timeout=timeout)


def check_empty(engine: Engine) -> None:
    assert (engine.waiting, engine.running) == (0, 0)
    assert engine.free_positions == engine.positions
    assert engine.cache.lengths == [0] * len(engine.cache.lengths)


def test_shares() -> None:
    assert _shares([], 8) == []
    assert _shares([3], 8) == [3]
    assert _shares([30], 8) == [8]
    assert _shares([30, 30], 8) == [8, 0]  # nothing is cut into smaller pieces than it has to be
    assert _shares([30, 2, 1], 8) == [5, 2, 1]
    assert _shares([30, 5, 9], 8) == [4, 4, 0]
    assert _shares([2, 30, 5], 9) == [2, 3, 4]
    assert _shares([30, 2], 1) == [1, 0]


def test_no_more_wait_than_may(model: CausalLM) -> None:
    engine = engine_for(model, max_waiting=1)
    requests = [add(engine, 5) for _ in range(3)]  # two of which have a slot as soon as there is a step
    assert (engine.waiting, engine.running) == (3, 0)
    with pytest.raises(BusyError, match="0 requests run and 3 wait"):
        add(engine, 5)
    engine.step()
    assert (engine.waiting, engine.running) == (1, 2)
    with pytest.raises(BusyError, match="2 requests run and 1 wait"):
        add(engine, 5)
    finish(engine)
    assert [len(request.tokens) for request in requests] == [4, 4, 4]
    add(engine, 5)
    finish(engine)
    check_empty(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_deadline_ends_who_waits_and_who_runs(model: CausalLM, overlap: bool) -> None:
    engine = engine_for(model, slots=2, overlap=overlap)
    running, other = add(engine, 5, 400, timeout=60), add(engine, 5, 12)
    waiting = add(engine, 5, timeout=60)
    for _ in range(4):
        engine.step()
    assert running.started is not None
    assert time.monotonic() - 5 < running.started < time.monotonic()
    assert waiting.started is None
    for request in (running, waiting):
        request.added -= 60
    ended = engine.step()
    assert {running, waiting} <= set(ended)
    for request in (running, waiting):
        assert (request.finish_reason, request.timed_out) == ("error", True)
        assert request.error == "the time limit of 60 s has passed"
    assert 0 < len(running.tokens) < 10
    assert engine.running == 1
    finish(engine)
    assert (other.finish_reason, other.timed_out, len(other.tokens)) == ("length", False, 12)
    check_empty(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_who_is_cancelled_leaves_at_once(model: CausalLM, overlap: bool) -> None:
    engine = engine_for(model, slots=2, overlap=overlap)
    decoding, feeding, waiting = add(engine, 5, 50), add(engine, 200), add(engine, 9)
    for _ in range(3):
        engine.step()
    assert decoding.tokens
    assert feeding.feeding
    for request in (decoding, feeding, waiting):
        engine.finish(request)
        assert request.finish_reason == "stop"
    check_empty(engine)
    assert engine.step() == []
    assert add(engine, 5).error is None
    finish(engine)
    check_empty(engine)


def test_nobody_passes_who_waits_for_room(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.make_cache(3, 512, pool_positions=3 * 256)  # two pages for requests
    monkeypatch.setattr(engines, "make_cache", lambda *_, **__: cache)
    engine = Engine(model)
    first, large, small = add(engine, 5, 20), add(engine, 300), add(engine, 5)
    assert (engine.positions, engine.free_positions) == (512, 512)
    engine.step()
    assert engine.free_positions == 256
    while first.finish_reason is None:
        assert large.started is None
        assert small.started is None
        engine.step()
    engine.step()
    assert large.started is not None
    assert small.started is None
    finish(engine)
    assert len(small.tokens) == 4
    check_empty(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_long_prompt_holds_up_nobody_and_is_not_held_up(model: CausalLM, overlap: bool) -> None:
    engine = engine_for(model, slots=8, step=32, overlap=overlap)
    long = add(engine, 320, 1)
    engine.step()
    assert long.prefilled == 32
    steps = 1
    while long.feeding:
        short = add(engine, 6, 3)
        before = long.prefilled
        engine.step()
        steps += 1
        assert not short.feeding  # at once
        assert long.prefilled - before >= min(16, 320 - before)  # half of a step's prompt
    assert steps <= 1 + (320 - 32) / 16
    finish(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_who_decodes_gets_a_token_in_every_step(model: CausalLM, overlap: bool) -> None:
    engine = engine_for(model, slots=2, step=32, overlap=overlap)
    decoding = add(engine, 5, 60)
    engine.step()
    engine.step()
    long = add(engine, 320, 1)
    counts, fed = [], []
    while not long.tokens:
        counts.append(len(decoding.tokens))
        fed.append(long.prefilled)
        engine.step()
    assert [b - a for a, b in pairwise(counts)] == [1] * (len(counts) - 1)
    assert {b - a for a, b in pairwise(fed)} == {32}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_slot_used_before_is_as_good_as_new(model: CausalLM, overlap: bool) -> None:
    wanted = add(fresh := engine_for(model, overlap=overlap), 40, 10)
    finish(fresh)
    engine = engine_for(model, slots=1, overlap=overlap)
    add(engine, 70, 20)
    finish(engine)
    recurrent = [layer for layer in engine.cache.layers if isinstance(layer, RecurrentCache)]
    assert recurrent
    for layer in engine.cache.layers:
        for tensor in layer.tensors:
            tensor.fill_(torch.nan)
    again = add(engine, 40, 10)
    finish(engine)
    assert again.error is None
    assert again.tokens == wanted.tokens
