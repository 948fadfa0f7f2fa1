"""A decode step waits for nothing: neither for the whole device, nor for a copy. The host waits for tokens alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gfxlm.device.arch import named
from gfxlm.engine.decode import DecodeStep
from gfxlm.engine.engine import Engine
from gfxlm.engine.grammar import Grammar
from gfxlm.engine.load import load
from gfxlm.engine.logprobs import Draw
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.engine.sampler import Sampler
from gfxlm.kernels.launch import recording
from gfxlm.models.synthetic import PUBLISHED
from tests.engine.test_launch_counts import META, hollow

SLOTS = 3
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "filtered": SamplingParams(temperature=0.7, top_p=0.9, top_k=20, min_p=0.05),
    "penalties": SamplingParams(temperature=1.0, repetition_penalty=1.2, presence_penalty=0.5, logit_bias={3: 1.0}),
    "reported": SamplingParams(temperature=1.0, top_logprobs=5, grammar=Grammar("json_object")),
}


class Anything:
    """A grammar of any text."""

    error = None

    def matcher(self, _: Grammar) -> "Anything":
        return self

    def accept(self, token: int) -> None:
        pass

    def masks(self, matchers: Sequence["Anything"]) -> Tensor:
        return torch.full((len(matchers), 6144 // 32), -1, dtype=torch.int32)


class WaitedError(AssertionError):
    """Somebody waited."""


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for a device, a stream or an event raises."""

    def waited(*_: object) -> None:
        raise WaitedError

    monkeypatch.setattr(torch.cuda, "synchronize", waited)
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", waited)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", waited)


class Reading(Sampler):
    """One that does what must not be done."""

    def __init__(self, way: str, *args: Any) -> None:
        super().__init__(*args)
        self._way = way

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Draw:
        if self._way == "synchronize":
            torch.cuda.synchronize()
        elif self._way == "nonzero":
            logits[logits[:, 0] > 0]
        else:
            getattr(positions[0] if self._way == "item" else positions, self._way)()
        return super().sample(logits, slots, positions)


def steps(name: str, sampler: type[Sampler] | Any, params: SamplingParams) -> None:
    """The first tokens of sequences and two further steps, on a device without numbers: to read one is an error."""
    model = hollow(name)
    with torch.inference_mode(), recording(named("gfx1151")) as launches:
        chosen = sampler(SLOTS + 1, model.config.vocab_size, META)
        for slot in range(SLOTS):
            chosen.set(slot, params, [1, 2, 3])
        step = DecodeStep(model, model.make_cache(SLOTS, 64), chosen)
        hidden = torch.empty(SLOTS, model.config.hidden_size, dtype=model.dtype, device=META)
        step.begin(range(SLOTS), hidden, torch.zeros(SLOTS, dtype=torch.int64, device=META))
        step.run(range(SLOTS))
        step.place({1: 7})
        step.run([2, 1])
    assert launches


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@pytest.mark.parametrize("name", [*PUBLISHED, "builtin"])
def test_a_step_reads_nothing_back(no_waits: None, name: str, params: SamplingParams) -> None:
    steps(name, Sampler, params)


@pytest.mark.parametrize("way", ["item", "tolist", "cpu", "numpy", "nonzero", "synchronize"])
def test_whoever_reads_is_found_out(no_waits: None, way: str) -> None:
    # Each has an error of its own: torch's meta tensors have nothing to be read.
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, WaitedError)):
        steps("builtin", lambda *args: Reading(way, *args), PARAMS["greedy"])


@contextmanager
def counted_event_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.cuda.Event]]:
    """Waits for events are collected, for anything else they raise: torch's own watch and ours."""
    waits: list[torch.cuda.Event] = []
    wait = torch.cuda.Event.synchronize

    def waited(*_: object) -> None:
        raise WaitedError

    def collected(event: torch.cuda.Event) -> None:
        waits.append(event)
        wait(event)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", waited)
        patch.setattr(torch.cuda.Stream, "synchronize", waited)
        patch.setattr(torch.cuda.Event, "synchronize", collected)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_an_engine_waits_for_tokens_alone(monkeypatch: pytest.MonkeyPatch, params: SamplingParams) -> None:
    engine = Engine(load("builtin", device="cuda")[0], max_batch=SLOTS, max_context=128, grammars=Anything())
    requests = [start(engine, params, length) for length in (5, 17, 1)]
    while engine.prefilling or any(len(request.tokens) < 3 for request in requests):
        engine.step()
    torch.cuda.synchronize()
    before = [len(request.tokens) for request in requests]
    with counted_event_waits(monkeypatch) as waits:
        for _ in range(20):
            engine.step()
    assert [len(request.tokens) for request in requests] == [count + 20 for count in before]
    assert len(waits) == 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("read", [lambda x: x[0].item(), lambda x: x.cpu(), lambda x: x.nonzero()])
def test_a_gpus_watch_finds_who_reads(monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    x = torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), counted_event_waits(monkeypatch):
        read(x)


def start(engine: Engine, params: SamplingParams, length: int) -> Request:
    return engine.add(range(100, 100 + length), replace(params, max_tokens=-1))
