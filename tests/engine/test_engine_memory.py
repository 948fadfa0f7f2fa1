"""An engine whose requests share pages, and one whose memory runs out."""

import pytest
import torch
from torch import Tensor

from gfxlm.engine import engine as engines
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache
from gfxlm.ops.ragged import Slots

PROMPTS = [(20, 30), (200, 5), (1, 60), (90, 10), (30, 226)]  # tokens, and tokens to generate


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load("builtin", device="cpu", dtype=torch.float32)[0]


def finish(engine: Engine) -> None:
    for _ in range(2000):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


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
    plain = model.make_cache(4, 256)
    paged = model.make_cache(4, 256, pool_positions=512)  # with one that belongs to nobody: two pages, or three
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
