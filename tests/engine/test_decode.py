"""Decode steps that are launched ahead, against the plain engine: the same tokens, however requests come and go."""

from collections.abc import Callable
from typing import ClassVar, cast

import pytest
import torch
from torch import Tensor

from gfxlm.device.graph import Pool
from gfxlm.engine import decode, prefill
from gfxlm.engine.decode import DecodeStep
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.logprobs import Draw
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.prefill import PrefillStep
from gfxlm.engine.request import Request
from gfxlm.models.base import CausalLM
from tests.engine.serving import finish


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load("builtin", dtype=torch.float32, device="cpu")[0]


def serve(model: CausalLM, overlap: bool, *, temperature: float = 0.8) -> list[Request]:
    """Three slots, six requests of different lengths, some of which join while others run."""
    engine = Engine(model, max_batch=3, max_context=48, overlap=overlap)
    requests = []
    for seed, (length, max_tokens) in enumerate([(5, 9), (1, 1), (17, 4), (3, 12), (2, -1), (9, 2)]):
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, repetition_penalty=1.2)
        requests.append(engine.add(range(100 + seed, 100 + seed + length), params))
        if seed % 2:
            engine.step()
    finish(engine)
    return requests


def test_same_tokens(model: CausalLM) -> None:
    for ahead, plain in zip(serve(model, True), serve(model, False), strict=True):
        assert ahead.tokens == plain.tokens
        assert ahead.finish_reason == plain.finish_reason == "length"


def test_end_of_text(model: CausalLM) -> None:
    """A request that stops by a token is over, although its next step has been launched."""
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    engine = Engine(model, max_context=64, overlap=False)
    plain = engine.add([5, 6, 7], params)
    finish(engine)
    last = next(token for i, token in enumerate(plain.tokens) if i > 3 and token not in plain.tokens[:i])
    stop = plain.tokens.index(last)
    engine = Engine(model, max_context=64, eos_token_ids=[last], overlap=True)
    for _ in range(2):  # the second one in the slot that the step too many ran on
        request = engine.add([5, 6, 7], params)
        finish(engine)
        assert request.tokens == plain.tokens[: stop + 1]
        assert request.finish_reason == "stop"


@pytest.mark.parametrize("overlap", [True, False])
def test_cache_is_continued(model: CausalLM, overlap: bool) -> None:
    """However a request ends, its cache holds everything up to its last token, that one included, and no more."""
    params = SamplingParams(max_tokens=10, temperature=0.0)
    engine = Engine(model, max_context=64, overlap=False)
    plain = engine.add([5, 6, 7], params)
    finish(engine)
    for cut in (3, 6):
        cache = model.make_cache(1, 64)
        engine = Engine(model, cache=cache, overlap=overlap)
        first = engine.add([5, 6, 7], params)
        while len(first.tokens) < cut:
            engine.step()
        engine.finish(first)
        assert cache.lengths == [3 + cut]
        engine = Engine(model, cache=cache, overlap=overlap)
        # The token that greedy decoding would choose next is given as the prompt.
        second = engine.add([plain.tokens[cut]], SamplingParams(max_tokens=9 - cut, temperature=0.0))
        finish(engine)
        assert [*first.tokens, plain.tokens[cut], *second.tokens] == plain.tokens


def test_launches_ahead(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = DecodeStep.run
    monkeypatch.setattr(DecodeStep, "run", lambda self, slots: runs.append(len(slots)) or run(self, slots))
    engine = Engine(model, max_context=64, overlap=True)
    request = engine.add([1, 2], SamplingParams(max_tokens=5))
    engine.step()
    assert (len(request.tokens), len(runs)) == (1, 0)
    engine.step()
    assert (len(request.tokens), len(runs)) == (2, 2)
    finish(engine)
    assert (len(request.tokens), len(runs)) == (5, 4)


class Recorded:
    """A graph as if there were a GPU: a replay does nothing in Python, and results lie where they lay."""

    made: ClassVar[list["Recorded"]] = []
    resets = 0

    def __init__(self, function: Callable[[], None], *_: object, **__: object) -> None:
        self._function = function
        self.made.append(self)

    def capture(self) -> None:
        self._function()

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        self.resets += 1


class ByKey:
    """A sampler with log probabilities for some of its keys."""

    graph_key = ""

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Draw:
        values = {"ones": 1.0, "twos": 2.0}
        value = values.get(self.graph_key)
        return Draw(torch.zeros_like(slots), None if value is None else torch.full_like(logits, value))


def test_log_probabilities_are_those_of_the_recording_that_ran(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "Graph", Recorded)
    monkeypatch.setattr(DecodeStep, "_forward", lambda self, bucket: None)
    sampler = ByKey()
    step = DecodeStep(model, model.make_cache(1, 8), sampler, pool=cast(Pool, object()))
    for key, value in [("ones", 1), ("none", None), ("ones", 1), ("twos", 2), ("ones", 1), ("none", None)]:
        sampler.graph_key = key
        logprobs = step.run([0]).read().logprobs
        assert (None if logprobs is None else logprobs.unique().item()) == value


def test_a_reset_lets_go_of_every_recording(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decode, prefill):
        monkeypatch.setattr(module, "Graph", Recorded)
    monkeypatch.setattr(DecodeStep, "_forward", lambda self, bucket: None)
    monkeypatch.setattr(PrefillStep, "_forward", lambda self, chunk: None)
    pool = cast(Pool, object())
    steps = DecodeStep(model, model.make_cache(3, 8), ByKey(), pool)
    chunks = PrefillStep(model, model.make_cache(3, 64), 64, pool)
    with torch.inference_mode():
        for _ in range(2):
            monkeypatch.setattr(Recorded, "made", [])
            steps.warm_up()
            steps.run([0, 2])
            chunks.warm_up()
            chunks.run([1, 2], [0], [2])
            # Steps of 1, 2 and 3 rows, their heads and their sampling; chunks of 16, 32, 48 and 64 rows.
            assert len(Recorded.made) == 3 * 3 + 4
            steps.reset()
            chunks.reset()
            assert [graph.resets for graph in Recorded.made] == [1] * len(Recorded.made)
