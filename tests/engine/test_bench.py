"""The bench feeds just the tokens that its tests are named after, and counts only their time."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gfxlm
from gfxlm.device.ceilings import matmul_rate, read_bandwidth
from gfxlm.engine.bench import Bench, Result, Workload
from gfxlm.engine.info import describe
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.ops.ragged import Slots
from gfxlm.weights.checkpoint import Checkpoint
from tests.checkpoints import mlx_checkpoint


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return gfxlm.load(mlx_checkpoint(request.param))[0]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The positions of every forward pass, in order."""
    seen: list[list[int]] = []
    forward = CausalLM.forward

    def watching(self: CausalLM, tokens: Tensor, positions: Tensor, slots: Slots, cache: Any) -> Tensor:
        seen.append(positions.tolist())
        return forward(self, tokens, positions, slots, cache)

    monkeypatch.setattr(CausalLM, "forward", watching)
    return seen


def test_names() -> None:
    assert Workload(512, 0).name == "pp512"
    assert Workload(0, 128).name == "tg128"
    assert Workload(512, 0, 4096).name == "pp512 @ d4096"
    assert Workload(512, 128, 1).name == "pp512+tg128 @ d1"


def test_prompt(model: CausalLM, passes: list[list[int]]) -> None:
    result = Bench(model).run(Workload(20, 0), 3, warm_up=False)
    assert passes == [list(range(20))] * 3
    assert len(result.speeds) == 3


def test_generation(model: CausalLM, passes: list[list[int]]) -> None:
    Bench(model).run(Workload(0, 3), 2, warm_up=False)
    assert passes == [[0], [1], [2], [3]] * 2


def test_prompt_and_generation(model: CausalLM, passes: list[list[int]]) -> None:
    Bench(model).run(Workload(4, 2), 1, warm_up=False)
    assert passes == [[0, 1, 2, 3], [4], [5]]


def test_depth_is_fed_once(model: CausalLM, passes: list[list[int]]) -> None:
    Bench(model).run(Workload(4, 0, 6), 2, warm_up=False)
    assert passes == [list(range(6)), [6, 7, 8, 9], [6, 7, 8, 9]]
    passes.clear()
    Bench(model).run(Workload(0, 2, 6), 2, warm_up=False)
    assert passes == [list(range(6)), [6], [7], [8], [6], [7], [8]]


def test_warm_up_and_chunks(model: CausalLM, passes: list[list[int]]) -> None:
    Bench(model, prefill_step_size=3).run(Workload(5, 2), 1)
    engines_own, prompt = [[0], [1]], [[0, 1, 2], [3, 4]]
    assert passes == [*engines_own, *prompt, [5], *prompt, [5], [6]]


def test_batch(model: CausalLM, passes: list[list[int]]) -> None:
    Bench(model, batch_size=3).run(Workload(2, 2), 1, warm_up=False)
    assert passes == [[0, 1] * 3, [2] * 3, [3] * 3]


def test_only_the_named_tokens_are_timed(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    forward = CausalLM.forward

    def one_second_a_token(self: CausalLM, tokens: Tensor, *rest: Any) -> Tensor:
        clock[0] += len(tokens)
        return forward(self, tokens, *rest)

    monkeypatch.setattr(CausalLM, "forward", one_second_a_token)
    monkeypatch.setattr("gfxlm.engine.bench.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for workload in (Workload(10, 0, 30), Workload(0, 10, 30), Workload(5, 5, 30)):
        assert Bench(model).run(workload, 2).speeds == [1.0, 1.0]
        assert Bench(model, batch_size=2).run(workload, 2).speeds == [1.0, 1.0]


def test_first_run_is_told(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's very first run takes a second more a token, as if something were made that later ones find."""
    clock, forward, seen = [0.0], CausalLM.forward, set()

    def slow_at_first(self: CausalLM, tokens: Tensor, *rest: Any) -> Tensor:
        clock[0] += len(tokens) * (1 if len(tokens) in seen else 2)
        seen.add(len(tokens))
        return forward(self, tokens, *rest)

    monkeypatch.setattr(CausalLM, "forward", slow_at_first)
    monkeypatch.setattr("gfxlm.engine.bench.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    bench = Bench(model)
    warm = bench.run(Workload(10, 0), 2)
    assert (warm.first, warm.speeds) == (0.5, [1.0, 1.0])
    cold = bench.run(Workload(11, 0), 2, warm_up=False)
    assert (cold.first, cold.speeds) == (0.5, [0.5, 1.0])
    for generating in (Workload(0, 2), Workload(10, 2)):
        assert bench.run(generating, 1).first is None


def test_memory() -> None:
    info = describe(Checkpoint.open(mlx_checkpoint("qwen3_next")))
    held = info.resident_bytes + 2 * info.cache_bytes(100 + 1 + 9)
    result = Result(Workload(0, 9, 100), 2, [1.0], peak_bytes=int(1.25 * held))
    assert result.memory_share(info) == pytest.approx(1.25)
    assert Result(Workload(0, 9), 1, [1.0]).memory_share(info) is None


def test_nobody_counts_a_cpus_memory(model: CausalLM) -> None:
    assert Bench(model).run(Workload(4, 0), 1).peak_bytes is None


def test_statistics_and_rates() -> None:
    info = describe(Checkpoint.open(mlx_checkpoint("qwen3_next")))
    result = Result(Workload(0, 9, 100), 1, [10.0, 14.0])
    assert (result.mean, result.deviation) == (12.0, pytest.approx(8**0.5))
    assert result.bandwidth(info) == pytest.approx(12 * (info.bytes_per_token + 105 * info.kv_bytes_per_token))
    assert result.compute_rate(info) is None
    prompt = Result(Workload(64, 0, 5), 1, [128.0])
    assert prompt.deviation == 0.0
    assert prompt.compute_rate(info) == pytest.approx(2 * info.prefill_operations(64, 5))
    assert prompt.bandwidth(info) is None
    # The sequences of a batch share weights: what they read together is not known.
    assert Result(Workload(0, 9), 2, [10.0]).bandwidth(info) is None
    both = Result(Workload(4, 4), 1, [10.0])
    assert both.bandwidth(info) is both.compute_rate(info) is None


def test_what_cannot_be_measured(model: CausalLM) -> None:
    with pytest.raises(UserError, match="pp2000 needs 2000 positions, but the context holds 1024"):
        Bench(model).run(Workload(2000, 0))
    with pytest.raises(UserError, match="tg24 @ d1000 needs 1025 positions"):
        Bench(model).check(Workload(0, 24, 1000))
    for nothing in (Workload(0, 0), Workload(4, -1), Workload(4, 0, -1)):
        with pytest.raises(UserError, match="nothing to measure"):
            Bench(model).check(nothing)
    with pytest.raises(UserError, match="batch_size must be at least 1, but is 0"):
        Bench(model, batch_size=0)


def test_ceilings_are_those_of_a_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gfxlm.device.ceilings._READ_BYTES", {"cpu": 1 << 26})
    monkeypatch.setattr("gfxlm.device.ceilings._MATRIX_SIZE", {"cpu": 512})
    cpu = torch.device("cpu")
    x = torch.ones(1 << 24)
    start = time.perf_counter()
    for _ in range(5):
        x.amax()
    plain = 5 * x.nbytes / (time.perf_counter() - start)
    assert plain / 4 < read_bandwidth(cpu) < 1e13
    assert 1e9 < matmul_rate(cpu) < 1e15
