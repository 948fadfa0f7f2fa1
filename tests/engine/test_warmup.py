"""What a model would launch, found out without its weights."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gfxlm.cli import warmup as command
from gfxlm.device.arch import ARCHITECTURES, named
from gfxlm.engine import trial
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.sampler import Sampler
from gfxlm.engine.trial import Trial
from gfxlm.engine.warmup import ModelCases, _without_weights
from gfxlm.errors import UserError
from gfxlm.kernels.case import Call, Case
from gfxlm.kernels.launch import _kind
from gfxlm.kernels.record import record
from gfxlm.models.load import load_model
from gfxlm.weights import safetensors_file
from gfxlm.weights.checkpoint import Checkpoint
from tests.checkpoints import mlx_checkpoint
from tests.cli.runner import run

CASES = ModelCases("builtin")


@pytest.fixture
def _no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: object) -> Tensor:
        raise AssertionError("weights are read")

    _without_weights.cache_clear()
    monkeypatch.setattr(safetensors_file.Extent, "read_into", read)


def kernels(case: Case, arch: str) -> set[tuple[object, ...]]:
    """What the machine code of a case's launches depends on."""
    return {
        (one.kernel.__name__, *map(_kind, one.arguments), *sorted(one.constants.items()), *sorted(one.options.items()))
        for one in record(case, named(arch))
    }


@functools.cache
def warmed(arch: str) -> set[tuple[object, ...]]:
    return set[tuple[object, ...]]().union(*(kernels(CASES(name), arch) for name in CASES.names()))


@pytest.mark.usefixtures("_no_reading")
@pytest.mark.parametrize("arch", ["gfx1151", "gfx942", "sm_90"])
def test_a_models_launches(arch: str) -> None:
    cases = ModelCases("builtin", dtype="float16")
    assert {"step/1/4096", "paged-step/8/4096", "prompt/512", "chunk/512", "sampling/filtered"} <= set(cases.names())
    one, many, chunk = (record(cases(name), named(arch)) for name in ("step/1/300", "prompt/512", "chunk/512"))
    assert {launch.kernel.__name__ for launch in chunk} >= {"prefill_kernel", "chunk_walk_kernel"}
    assert {launch.kernel.__name__ for launch in one} != {launch.kernel.__name__ for launch in many}
    floats = {a.dtype for launch in one for a in launch.arguments if isinstance(a, Tensor) and a.is_floating_point()}
    assert floats <= {torch.float16, torch.float32}


def test_every_case_can_be_recorded_on_every_target() -> None:
    for arch in ("gfx90a", "gfx1201"):
        assert {name.split("/")[0] for name in CASES.names() if not record(CASES(name), named(arch))} == set()


def test_pages_are_read_where_a_cache_has_them() -> None:
    for name, paged in (
        ("step/4/4096", False),
        ("paged-step/4/4096", True),
        ("prompt/48", False),
        ("paged-prompt/48", True),
    ):
        [writer] = {launch.kernel: launch for launch in record(CASES(name), named("gfx1151"))
                    if launch.kernel.__name__ == "qkv_kernel"}.values()  # fmt: skip
        pages = dict(zip(writer.kernel.arg_names, writer.arguments, strict=False))["p_pages"]
        assert isinstance(pages, Tensor) == paged, name


def test_one_layer_of_each_kind_is_enough() -> None:
    """Every layer of a model would launch the same again."""
    whole, model = load_model(Checkpoint.open(mlx_checkpoint("qwen3_next"))), _without_weights(CASES)
    assert len(model.layers) < len(whole.layers)
    assert [layer.mixer_name for layer in model.layers] == ["linear_attn", "self_attn"]


@pytest.mark.parametrize("arch", ["gfx1151", "gfx942", "gfx1201", "sm_90"])
def test_the_self_test_compiles_nothing_more(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps on a device without memory, and nobody to judge what comes out."""

    def nothing(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=torch.float64)

    def no_matrix(weight: SimpleNamespace, rows: Tensor | None = None) -> Tensor:
        return torch.zeros(weight.shape[-2] if rows is None else len(rows), weight.shape[-1], dtype=torch.float64)

    read = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else read(x))
    monkeypatch.setattr(trial, "numbers", nothing)
    monkeypatch.setattr(trial, "matrix", no_matrix)
    for judged in ("judge_all", "_routing"):
        monkeypatch.setattr(Trial, judged, lambda *args, **named: None)
    model = _without_weights(CASES)

    def rehearse(device: torch.device) -> Call:
        def call() -> None:
            made = Trial(model)
            for number, layer in enumerate(model.layers):
                made.layer(number, layer)
            made.head()
            for rows, columns in ((4, model.config.vocab_size), (trial.DRAWS, trial.VOCABULARY)):
                scores = torch.empty(columns, dtype=torch.float32 if rows > 4 else model.dtype, device=device)
                for params in (
                    SamplingParams(),
                    SamplingParams(temperature=0.7),
                    SamplingParams(temperature=0.7, top_k=9),
                ):
                    if rows > 4 or not params.temperature:
                        sampler = Sampler(1, columns, device)
                        sampler.set(0, params)
                        places = torch.zeros(rows, dtype=torch.int64, device=device)
                        sampler.sample(scores.expand(rows, -1), places, places)

        return call

    missing = kernels(Case("self-test", rehearse), arch) - warmed(arch)
    assert {name for name, *_ in missing} == set()


def test_no_such_model() -> None:
    with pytest.raises(UserError, match="nowhere"):
        ModelCases("./nowhere").names()


@pytest.mark.parametrize(("here", "tried"), [("gfx1151", 1), ("gfx1100", 0)])
def test_libraries_are_tried_on_the_gpu_that_is_here(here: str, tried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr("gfxlm.kernels.codegen.compile_all", lambda *args: iter(()))
    monkeypatch.setattr("gfxlm.device.select.pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("gfxlm.device.arch.architecture", lambda device: ARCHITECTURES[here])
    monkeypatch.setattr("gfxlm.device.gemm_probe.ensure", asked.append)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(command, "require_triton", lambda: None)
    assert run("warmup", "--arch", "gfx1151", "--model", "builtin").stdout.startswith("gfx1151: 0 kernels compiled")
    assert len(asked) == tried
