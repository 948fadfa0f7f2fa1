"""Something raises: whose work it was fails, all others get their texts, and the engine goes on."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from gfxlm.engine import budget
from gfxlm.engine.drafters import PromptLookup
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.models import base
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache
from gfxlm.ops.ragged import Slots
from tests.engine.serving import finish

POISON = 401
PROMPTS = [[(3 * i + n) % 400 for i in range(10 + 30 * n)] for n in range(4)]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load("builtin", device="cpu", dtype=torch.float32)[0]


@pytest.fixture(params=["plain", "overlap", "prefix_cache"])
def engine(model: CausalLM, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    for module in (base, budget):
        monkeypatch.setattr(module, "page_size", lambda device: 16)
    kind = request.param
    return Engine(
        model,
        max_batch=4,
        max_context=192,
        prefill_step_size=256,
        overlap=kind != "plain",
        prefix_cache=kind == "prefix_cache",
    )


@pytest.fixture(scope="module")
def wanted(model: CausalLM) -> list[list[int]]:
    """The texts where nothing fails."""
    texts = []
    for prompt in PROMPTS:
        engine = Engine(model, max_context=192)
        request = add(engine, prompt)
        finish(engine)
        texts.append(request.tokens)
    return texts


def add(engine: Engine, prompt: list[int]) -> Request:
    return engine.add(prompt, SamplingParams(max_tokens=6))


def check(engine: Engine, wanted: list[list[int]], texts: Mapping[Request, list[int] | None]) -> None:
    """Who has no text failed, the others have theirs, nothing is left behind, and what comes later is right."""
    finish(engine)
    for request, text in texts.items():
        if text is None:
            assert request.finish_reason == "error"
            assert request.error == "RuntimeError: injected"
            with pytest.raises(RuntimeError, match="injected"):
                request.check()
        else:
            assert request.error is None
            assert request.tokens == text
    check_empty(engine)
    later = [add(engine, prompt) for prompt in PROMPTS]
    finish(engine)
    assert [request.tokens for request in later] == wanted
    check_empty(engine)


def texts_of(
    requests: list[Request], wanted: list[list[int]], guilty: Collection[int]
) -> dict[Request, list[int] | None]:
    """What is to become of requests that ask for `PROMPTS`."""
    return {request: None if n in guilty else wanted[n] for n, request in enumerate(requests)}


def check_empty(engine: Engine) -> None:
    assert (engine.waiting, engine.running) == (0, 0)
    assert engine.free_positions == engine.positions
    assert engine.cache.lengths == [0] * 4
    assert sorted(engine._scheduler._free) == list(range(4))
    assert all(params == SamplingParams() for params in engine.sampler._params)  # type: ignore[attr-defined]


def raising(when: Callable[..., bool], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that raises when that says so of its arguments."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise RuntimeError("injected")
        return function(*args, **kwargs)

    return wrapper


def test_a_sampler_refuses_one(engine: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [add(engine, prompt) for prompt in PROMPTS]
    with monkeypatch.context() as patch:
        refuses = raising(lambda slot, params, prompt=(): len(prompt) == 40, engine.sampler.set)
        patch.setattr(engine.sampler, "set", refuses)
        assert engine.step().count(requests[1]) == 1
    check(engine, wanted, texts_of(requests, wanted, {1}))


def test_one_prompt_of_a_chunk(
    model: CausalLM, engine: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.forward

    def poisoned(tokens: Tensor, positions: Tensor, slots: Slots, cache: Cache) -> Tensor:
        hidden = forward(tokens, positions, slots, cache)  # what it has done by then is to do no harm
        if bool((tokens == POISON).any()):
            raise RuntimeError("injected")
        return hidden

    running = add(engine, PROMPTS[0])
    engine.step()
    engine.step()
    guilty = add(engine, [*PROMPTS[1], POISON, 4])
    innocent = [add(engine, prompt) for prompt in PROMPTS[1:3]]
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", poisoned)
        before = len(running.tokens)
        seen = finish(engine)
    assert [seen.count(request) for request in (running, guilty, *innocent)] == [6 - before, 1, 6, 6]
    check(engine, wanted, {running: wanted[0], guilty: None, innocent[0]: wanted[1], innocent[1]: wanted[2]})


def test_a_decode_step(
    model: CausalLM, engine: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [add(engine, prompt) for prompt in PROMPTS[:2]]
    while not all(request.tokens for request in requests):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", raising(lambda *_: True, model.forward))
        assert set(engine.step()) == set(requests)
    check(engine, wanted, texts_of(requests, wanted, {0, 1}))


def test_a_decode_step_beside_a_prompt(
    model: CausalLM, engine: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that would have given a first token fails for others: that one begins again."""
    running = add(engine, PROMPTS[0])
    engine.step()
    engine.step()
    new = add(engine, PROMPTS[3])
    with monkeypatch.context() as patch:
        decodes = raising(lambda tokens, positions, slots, cache: len(tokens) == 1, model.forward)
        patch.setattr(model, "forward", decodes)
        engine.step()
    check(engine, wanted, {running: None, new: wanted[3]})


def test_sampling_of_first_tokens(engine: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [add(engine, prompt) for prompt in PROMPTS]
    with monkeypatch.context() as patch:
        patch.setattr(engine.sampler, "sample", raising(lambda *_: True, engine.sampler.sample))
        assert engine.step() == []
    check(engine, wanted, texts_of(requests, wanted, ()))


def test_a_token_is_handed_out(engine: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [add(engine, prompt) for prompt in PROMPTS]
    lifecycle = engine._lifecycle
    fails = raising(lambda request, *_: request is requests[2] and len(request.tokens) == 2, lifecycle._accept)
    monkeypatch.setattr(lifecycle, "_accept", fails)
    check(engine, wanted, texts_of(requests, wanted, {2}))


def test_a_slot_is_cleared(engine: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request leaves behind fails: the slot is free all the same."""
    requests = [add(engine, prompt) for prompt in PROMPTS]
    lifecycle = engine._lifecycle
    monkeypatch.setattr(lifecycle, "_end", raising(lambda request: request is requests[1], lifecycle._end))
    check(engine, wanted, texts_of(requests, wanted, {1}))


def test_a_prefix_is_copied(engine: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = engine.add(PROMPTS[0], SamplingParams(max_tokens=2), keep_cache=True)
    finish(engine)
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "copy_slot", raising(lambda *_: True, Cache.copy_slot))
        innocent = add(engine, PROMPTS[1])
        guilty = engine.add([1], SamplingParams(max_tokens=2), prefix=kept.cache)
        check(engine, wanted, {innocent: wanted[1], guilty: None})


def test_a_drafter(model: CausalLM, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, max_batch=4, max_context=192, drafter=PromptLookup(3))
    requests = [add(engine, prompt) for prompt in PROMPTS[:2]]
    with monkeypatch.context() as patch:
        drafter = engine._drafter
        patch.setattr(drafter, "draft", raising(lambda *_: True, drafter.draft))  # type: ignore[union-attr]
        finish(engine)
    check(engine, wanted, texts_of(requests, wanted, {0, 1}))


def test_nobody_knows_whose_it_was(engine: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [add(engine, prompt) for prompt in PROMPTS]
    while not all(request.tokens for request in requests):
        engine.step()
    with monkeypatch.context() as patch:
        scheduler = engine._scheduler
        patch.setattr(scheduler, "grow", raising(lambda: True, scheduler.grow))
        assert set(engine.step()) == set(requests)
    check(engine, wanted, texts_of(requests, wanted, range(4)))
