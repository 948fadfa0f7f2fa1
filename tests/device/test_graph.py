"""Recordings: whether there will be any, what replaces them, and that they let go of what they hold."""

import warnings
import weakref
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch

from gfxlm.device.graph import Graph, Pool, shared_pool


def test_switched_off_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFXLM_NO_GRAPH", "1")
    with pytest.warns(UserWarning, match="GFXLM_NO_GRAPH is set"):
        assert shared_pool(torch.device("cuda")) is None


def test_a_cpu_is_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shared_pool(torch.device("cpu")) is None


class Recording:
    """Stands in for torch's: it runs nothing, and counts."""

    refuses = False
    calls: ClassVar[list[str]] = []

    def replay(self) -> None:
        self.calls.append("replay")

    def reset(self) -> None:
        self.calls.append("reset")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    def record(graph: Recording, pool: object) -> nullcontext[None]:
        if Recording.refuses:
            raise RuntimeError("this driver records nothing")
        return nullcontext()

    monkeypatch.setattr(Recording, "calls", [])
    monkeypatch.setattr(Recording, "refuses", False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return Recording


def test_a_pool_that_is_renewed_is_another_one(recorder: type[Recording]) -> None:
    pool = Pool()
    before = pool.handle
    pool.renew()
    assert pool.handle is not before


class Held:
    """What a function works on."""

    count = 0

    def grow(self) -> None:
        self.count += 1


@pytest.mark.parametrize("refuses", [False, True])
def test_a_graph_that_was_reset_holds_nothing(refuses: bool, recorder: type[Recording]) -> None:
    recorder.refuses = refuses
    held = Held()
    graph, gone = Graph(held.grow, torch.device("cuda"), pool=Pool()), weakref.ref(held)
    with pytest.warns(UserWarning, match="this driver records nothing") if refuses else nullcontext():
        graph.capture()
    graph.replay()
    # Once to warm up; then once more to record it, or at the replay.
    assert (held.count, recorder.calls) == (2, [] if refuses else ["replay", "replay"])
    graph.reset()
    graph.reset()
    assert recorder.calls[2:] == ([] if refuses else ["reset"])
    del held
    assert gone() is None
    with pytest.raises(RuntimeError, match="the graph was reset"):
        graph.replay()


def test_without_a_pool_the_function_runs_until_it_is_reset() -> None:
    held = Held()
    graph = Graph(held.grow, torch.device("cpu"))
    graph.replay()
    graph.reset()
    assert held.count == 1
    with pytest.raises(RuntimeError, match="the graph was reset"):
        graph.replay()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_recording_is_freed_at_once() -> None:
    device = torch.device("cuda", 0)
    x = torch.zeros(64 << 20, device=device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)

    def add() -> None:
        x.add_((x + 1).sum())

    graph = Graph(add, device, pool=shared_pool(device))
    graph.capture()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) >= before + x.nbytes
    graph.reset()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) <= before + (4 << 20)
