"""The self-test passes where numbers are right, in every type and format, and catches a fault in each kind of layer."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gfxlm
from gfxlm.engine import sampler, self_test, trial
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.reference import Arithmetic, distribution, matrix
from gfxlm.engine.self_test import check, different_layers, require
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.load import load_model
from gfxlm.nn import mlp, norm, rope
from gfxlm.ops import attention, delta_mixer, kv
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.weight import PackedWeight
from tests.checkpoints import FAMILIES, mlx_checkpoint, transformers_checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def built_in() -> CausalLM:
    # The faults below are put into the CPU's operations.
    return gfxlm.load("builtin", device="cpu")[0]


def model_of(folder: Path, dtype: torch.dtype | None = None) -> CausalLM:
    return load_model(Checkpoint.open(folder), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_built_in_model_is_right(dtype: torch.dtype) -> None:
    assert check(gfxlm.load("builtin", device=DEVICE, dtype=dtype)[0]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_right(family: str) -> None:
    assert check(model_of(mlx_checkpoint(family))) == []


@pytest.mark.parametrize("recipe", ["3bit-32", "8bit", "mxfp4", "mixed_3_6"])
def test_formats_are_right(recipe: str) -> None:
    assert check(model_of(mlx_checkpoint("qwen3_next", recipe))) == []


def test_dense_weights_are_right() -> None:
    assert check(model_of(transformers_checkpoint("qwen3", torch.float32), torch.float32)) == []


def test_quantised_caches_are_right(built_in: CausalLM) -> None:
    assert check(built_in.with_quantized_kv(8, 64)) == []


def test_rotating_caches_are_no_matter(built_in: CausalLM) -> None:
    assert check(built_in.with_rotating_kv(16)) == []


def test_windows_are_right() -> None:
    model = model_of(mlx_checkpoint("llama"))
    for layer in model.layers:
        layer.mixer.window = 16
    assert check(model) == []


def test_one_layer_of_each_kind(built_in: CausalLM) -> None:
    assert [number for number, _ in different_layers(built_in)] == [0, 3]


def worse(function: Callable[..., Any], factor: float = 1.01) -> Callable[..., Any]:
    """The same function, a per cent too large."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * factor

    return wrapped


def noisier(noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As if the temperature were a quarter higher."""
    return worse(noise, 1.25)


def faded(update: Callable[..., Any]) -> Callable[..., Any]:
    """A state that is forgotten two per cent faster than it should be."""
    return lambda q, k, v, gamma, *rest: update(q, k, v, gamma * 0.98, *rest)


def louder(convolution: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        y, state = convolution(*args, **kwargs)
        return y * 1.02, state

    return wrapped


def turned_too_far(angles: Callable[..., Any]) -> Callable[..., Any]:
    return lambda positions, *args, **kwargs: angles(positions + 0.01, *args, **kwargs)


def one_column_lost(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As a kernel whose mask ends a column too early."""

    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        y = product(*args, **kwargs).clone()
        y[..., -1] = 0
        return y

    return wrapped


def last_row_lost(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        y = product(*args, **kwargs).clone()
        y[-1] = torch.nan
        return y

    return wrapped


def wrong_in_pages(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, pages, **named: attend(*args, pages=pages, **named) * (1 if pages is None else 1.01)


def wrong_expert(mlp_of_experts: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The second best expert's matrices are those of its neighbour."""
    return lambda x, experts, *rest, **named: mlp_of_experts(
        x, torch.stack((experts[:, 0], (experts[:, 1] + 1) % 8), 1), *rest, **named
    )


# Where the fault is put, how, and what the self-test is to call it.
FAULTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "linear": (PackedWeight, "_product", worse, "linear"),
    "linear, a column": (PackedWeight, "_product", one_column_lost, "linear"),
    "linear, a row": (PackedWeight, "_product", last_row_lost, "linear"),
    "experts": (mlp, "expert_mlp", worse, "experts"),
    "experts, another one": (mlp, "expert_mlp", wrong_expert, "experts"),
    "attention": (attention, "_attend", worse, "attention"),
    "attention, in pages": (trial, "cached_attention", wrong_in_pages, "attention"),
    "gated delta": (delta_mixer, "gated_delta_update", faded, "gated delta"),
    "convolution": (delta_mixer, "causal_conv1d", louder, "gated delta"),
    "norm": (norm, "rms_norm", worse, "norm"),
    "norm of heads": (kv, "rms_norm", worse, "rotary"),
    "rotary": (rope, "rope_angles", turned_too_far, "rotary"),
    "rotation": (kv, "rotate", lambda f: lambda x, cos, sin, **named: f(x, cos, -sin, **named), "rotary"),
    "sampling": (sampler, "gumbel", noisier, "sampling"),
    "sampling, top-k": (sampler, "keep_top_k", lambda f: lambda logs, k: f(logs, k + 1), "sampling"),
    "sampling, top-p": (sampler, "keep_top_p", lambda f: lambda logs, p: logs, "sampling"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str, built_in: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, spoil, kind = FAULTS[name]
    monkeypatch.setattr(owner, attribute, spoil(getattr(owner, attribute)))
    faults = check(built_in)
    assert kind in {fault.kind for fault in faults}
    assert all(fault.error > 1 for fault in faults)


def test_faults_stay_where_they_are(built_in: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is judged by what it was given, so that a wrong norm is not a wrong product."""
    monkeypatch.setattr(norm, "rms_norm", worse(norm.rms_norm))
    assert {fault.kind for fault in check(built_in)} == {"norm"}


def test_a_greedy_token_that_is_not_the_best(built_in: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = sampler.Sampler.sample

    def second(self: sampler.Sampler, logits: Tensor, *rest: Tensor) -> Any:
        draw = choose(self, logits, *rest)
        return draw._replace(tokens=(draw.tokens + 1) % logits.shape[1])

    monkeypatch.setattr(sampler.Sampler, "sample", second)
    assert str(check(built_in)[0]).startswith("sampler: sampling, 4 rows, off by inf times")


def test_rounding_is_of_the_size_it_says() -> None:
    x = torch.randn(1000, dtype=torch.float64)
    moved = (Arithmetic(0.01).round(x) / x - 1).abs()
    assert moved.max() <= 0.01
    assert moved.min() >= 0.005
    assert torch.equal(Arithmetic().round(x), x)


def test_some_rows_of_a_matrix(built_in: CausalLM) -> None:
    weight = built_in.model.embed_tokens.weight
    rows = torch.tensor([0, 5, weight.shape[0] - 1])
    assert torch.equal(matrix(weight, rows), matrix(weight)[rows])


def test_filters_of_the_distribution() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    wanted = distribution(scores, SamplingParams(temperature=1.0, top_p=0.6))
    assert wanted.tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert distribution(scores, SamplingParams(temperature=1.0, min_p=0.29))[2] > 0
    assert distribution(scores, SamplingParams(temperature=1.0, top_k=1)).tolist() == [1, 0, 0, 0]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A model whose device is a GPU to `require`, and a count of its checks."""
    asked = SimpleNamespace(count=0, faults=[], driver="1", file=tmp_path / "gfxlm" / "self-test.json")

    def counted(model: Any) -> list[self_test.Fault]:
        asked.count += 1
        return asked.faults

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_test, "check", counted)
    monkeypatch.setattr(self_test, "gpu_name", lambda device: "gfx1151")
    monkeypatch.setattr(self_test, "versions", lambda: {"driver": asked.driver})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="Radeon 8060S"))
    asked.model = SimpleNamespace(device=torch.device("cuda"), layers=[], dtype=torch.bfloat16, kv_format=None)
    return asked


def test_a_verdict_is_asked_for_once(on_a_gpu: SimpleNamespace) -> None:
    for _ in range(2):
        require(on_a_gpu.model)
    assert on_a_gpu.count == 1
    on_a_gpu.driver = "2"
    require(on_a_gpu.model)
    require(on_a_gpu.model)
    assert on_a_gpu.count == 2


def test_what_it_waits_for_is_said_once(on_a_gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        require(on_a_gpu.model)
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:42]) == ("", 1, "gfxlm: checking this GPU's numbers, one la")


def test_wrong_numbers_are_refused_every_time(on_a_gpu: SimpleNamespace) -> None:
    fault = self_test.Fault("model.layers.0.mlp", "experts", 72, 31.0)
    on_a_gpu.faults = [fault, fault]
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            require(on_a_gpu.model)
    assert str(caught.value) == (
        "gfx1151 computes wrong numbers, and text would be wrong: model.layers.0.mlp: experts, 72 rows, off by "
        "31 times what rounding may do (and 1 more); gfxlm doctor says more, --no-self-test goes on all the same"
    )
    assert on_a_gpu.count == 2
    assert not on_a_gpu.file.exists()


@pytest.mark.parametrize("text", ["", "{}", "[1, null]", "[", "\x00"])
def test_a_broken_file_of_verdicts_is_none(text: str, on_a_gpu: SimpleNamespace) -> None:
    on_a_gpu.file.parent.mkdir()
    on_a_gpu.file.write_text(text)
    require(on_a_gpu.model)
    assert on_a_gpu.count == 1
    require(on_a_gpu.model)
    assert on_a_gpu.count == 1


def test_where_nothing_can_be_written_it_is_asked_again(on_a_gpu: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "gfxlm").write_text("a file")
    for _ in range(2):
        require(on_a_gpu.model)
    assert on_a_gpu.count == 2


def test_a_cpu_is_not_asked(built_in: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "check", lambda model: pytest.fail("asked"))
    require(built_in)


def test_a_model_that_is_loaded_is_tested_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[CausalLM] = []
    monkeypatch.setattr("gfxlm.engine.load.require", asked.append)
    model, _ = gfxlm.load("builtin", device="cpu")
    assert asked == [model]
    gfxlm.load("builtin", device="cpu", self_test=False)
    assert asked == [model]
