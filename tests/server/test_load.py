"""The server under many rude clients, as a process: what `benchmarks.soak` does for minutes, in seconds."""

import pytest

from benchmarks.rude_clients import Reference, prompts
from benchmarks.soak import run


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True], ids=["default", "batch-invariant"])
def test_nothing_is_wrong_lost_or_left_behind(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the libraries' threads would wait for each other on a busy machine
    options = ["--max-concurrency", "8", "--max-queue", "4"]
    found, memory = run(seconds=20, clients=20, exact=exact, options=options)
    assert found.faults == []
    assert memory
    assert {"streams: right", "asks: right", "leaves_a_stream: left", "sends_nonsense: 400"} <= set(found.counts)


def test_what_counts_as_the_same_answer() -> None:
    reference = Reference("p", "one two three", (0, 4, 8), (2.0, 0.1, 3.0))
    assert reference.gap("one two three") == 0
    assert reference.gap("one tvo") == 0.1
    assert reference.gap("one two tree") == 3.0
    assert reference.gap("two") == 2.0
    assert reference.gap("one two three four") == 3.0


def test_prompts_share_their_beginnings() -> None:
    texts = prompts()
    assert len(set(texts)) == len(texts) == 12
    assert len({text[:400] for text in texts}) == 3
