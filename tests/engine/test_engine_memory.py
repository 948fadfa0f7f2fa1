"""An engine whose requests share pages, and one whose memory runs out."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from gfxlm.engine import engine as engines
from gfxlm.engine.decode import DecodeStep
from gfxlm.engine.drafters import DraftModel
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.prefill import PrefillStep
from gfxlm.engine.request import Request
from gfxlm.kernels import tuning
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache
from gfxlm.ops.ragged import Slots
from tests.engine.serving import finish

PAGE = 16
PROMPTS = [(4, 3), (30, 3), (1, 16), (17, 2), (12, 22)]  # tokens, and tokens to generate: one to three pages in the end


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load("builtin", device="cpu", dtype=torch.float32)[0]


def run(monkeypatch: pytest.MonkeyPatch, cache: Cache, model: CausalLM, overlap: bool) -> tuple[list[list[int]], int]:
    """The texts, and how many requests ran at a time at most."""
    monkeypatch.setattr(engines, "make_cache", lambda *_, **__: cache)
    engine = Engine(model, overlap=overlap)
    requests = [
        engine.add([(7 * number + i) % 4000 for i in range(length)], SamplingParams(max_tokens=most, temperature=0.0))
        for number, (length, most) in enumerate(PROMPTS)
    ]
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, len(engine._running))
    assert not any(request.error for request in requests)
    return [request.tokens for request in requests], most


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_wait_for_pages(model: CausalLM, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    plain = model.make_cache(4, 3 * PAGE)
    with tuning.override("pages", {"page_size": PAGE}):
        paged = model.make_cache(4, 3 * PAGE, pool_positions=5 * PAGE)  # one page belongs to nobody
    assert plain.pages is None
    assert paged.pages is not None
    wanted, together = run(monkeypatch, plain, model, overlap)
    texts, fewer = run(monkeypatch, paged, model, overlap)
    assert texts == wanted
    assert fewer < together == 4
    assert paged.pages.free == paged.pages.count - 1
    assert paged.lengths == [0] * 4


def test_an_engine_makes_its_cache_by_what_is_free(model: CausalLM) -> None:
    engine = Engine(model, max_batch=2, max_context=64)
    assert (len(engine.cache.lengths), engine.cache.max_context) == (2, 64)


class Hungry:
    """A model's forward that finds no memory for more than so many rows."""

    def __init__(self, model: CausalLM, most: int) -> None:
        self._forward, self._most = model.forward, most

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Slots, cache: Cache) -> Tensor:
        if len(tokens) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free")
        return self._forward(tokens, positions, slots, cache)


@pytest.mark.parametrize("overlap", [False, True])
def test_who_needs_too_much_fails_alone(model: CausalLM, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    def texts(lengths: list[int]) -> list[Request]:
        engine = Engine(model, max_batch=2, max_context=256, overlap=overlap)
        requests = []
        for length in lengths:
            requests.append(engine.add(list(range(5, 5 + length)), SamplingParams(max_tokens=12, temperature=0.0)))
            engine.step()
        finish(engine)
        later = engine.add([1, 2, 3], SamplingParams(max_tokens=4, temperature=0.0))
        finish(engine)
        assert engine.cache.lengths == [0, 0]
        return [*requests, later]

    wanted = texts([10, 20])
    monkeypatch.setattr(model, "forward", Hungry(model, 50))
    small, large, later = texts([10, 120])
    assert (large.finish_reason, large.tokens) == ("error", [])
    assert large.error is not None
    assert large.error.startswith("out of memory: a step wanted 2.00 GiB")
    assert "prefill_step_size" in large.error
    assert (small.finish_reason, small.tokens) == ("length", wanted[0].tokens)
    assert (later.finish_reason, later.tokens) == ("length", wanted[2].tokens)


def test_who_runs_out_of_memory_leaves_no_recordings(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, max_context=256, overlap=True)
    drafted = Engine(model, max_context=256, overlap=True, drafter=DraftModel(model))
    resets: list[str] = []
    for step in (PrefillStep, DecodeStep):
        reset = step.reset
        monkeypatch.setattr(step, "reset", lambda self, f=reset: resets.append(type(self).__name__) or f(self))
    monkeypatch.setattr(model, "forward", Hungry(model, 50))
    for one, expected in ((engine, 1), (drafted, 2)):
        resets.clear()
        failed = one.add(list(range(5, 80)), SamplingParams(max_tokens=4))
        finish(one)
        assert failed.error is not None
        assert failed.error.startswith("out of memory")
        assert sorted(resets) == ["DecodeStep"] * expected + ["PrefillStep"] * expected
    monkeypatch.setattr(model, "forward", lambda *_: 1 / 0)
    resets.clear()
    engine.add([1, 2], SamplingParams(max_tokens=4))
    finish(engine)
    assert resets == []


@pytest.mark.parametrize("overlap", [False, True])
def test_a_closed_engine_needs_no_garbage_collector(model: CausalLM, overlap: bool) -> None:
    engine = Engine(model, max_context=64, overlap=overlap)
    engine.add([1, 2, 3], SamplingParams(max_tokens=4))
    finish(engine)
    requests = [engine.add([1, 2, 3], SamplingParams(max_tokens=4)) for _ in range(2)]
    engine.step()
    engine.close()
    assert [request.error for request in requests] == ["the engine was closed"] * 2
    caches = [weakref.ref(tensor) for layer in engine.cache.layers for tensor in layer.tensors]
    gc.disable()
    try:
        del engine
        assert all(tensor() is None for tensor in caches)
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_recordings_is_freed_and_texts_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("builtin", device="cuda", dtype=torch.float32)[0]
    engine = Engine(model, max_batch=2, max_context=512)

    def text(length: int) -> Request:
        request = engine.add(list(range(5, 5 + length)), SamplingParams(max_tokens=30))
        finish(engine)
        return request

    def reserved() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    wanted = text(10)
    for size in (16, 64):  # to be recorded
        text(size)
        text(size)
    held = reserved()
    running = engine.add(wanted.prompt, wanted.params)
    while len(running.tokens) < 5:
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", Hungry(model, 100))
        failed = engine.add(list(range(5, 205)), SamplingParams(max_tokens=1))
        while failed.error is None:
            engine.step()
        assert reserved() < held
        finish(engine)
    assert failed.error.startswith("out of memory")
    assert running.tokens == wanted.tokens
    assert text(10).tokens == wanted.tokens
    engine.close()


def test_other_errors_are_not_hidden(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("shapes do not match")

    engine = Engine(model, max_context=32)
    request = engine.add([1], SamplingParams(max_tokens=1))
    monkeypatch.setattr(model, "forward", broken)
    finish(engine)
    assert request.error == "RuntimeError: shapes do not match"
    with pytest.raises(RuntimeError, match="shapes do not match"):
        request.check()


def test_a_cache_from_outside_keeps_its_length(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.make_cache(1, 128)
    engine = Engine(model, cache=cache)
    engine.add([1, 2, 3], SamplingParams(max_tokens=1))
    finish(engine)
    before = list(cache.lengths)
    monkeypatch.setattr(model, "forward", Hungry(model, 10))
    failed = engine.add(list(range(5, 60)), SamplingParams(max_tokens=1))
    finish(engine)
    assert failed.finish_reason == "error"
    assert cache.lengths == before
