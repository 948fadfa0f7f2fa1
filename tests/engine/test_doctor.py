"""The checks that run something, and what is made of what they measure."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gfxlm.device import gemm
from gfxlm.device.arch import AMD, named
from gfxlm.device.doctor import Host, TorchGPU, this_host
from gfxlm.device.finding import Finding
from gfxlm.device.gemm import Verdict, Verdicts
from gfxlm.engine import doctor
from gfxlm.engine.decisions import decisions
from gfxlm.engine.doctor import bandwidth, compiler, diagnose, graph, known_blas, matrix_rate, numerics
from gfxlm.engine.trial import Fault

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")


@pytest.fixture
def host() -> Host:
    return replace(this_host(CPU), gpus=())


@pytest.fixture
def radeon(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """An RX 7900 XTX that reads 800 GB/s and multiplies with 80 TFLOP/s."""
    monkeypatch.setattr(doctor, "architecture", lambda device: named("gfx1100"))
    monkeypatch.setattr(doctor, "read_bandwidth", lambda device: 800e9)
    monkeypatch.setattr(doctor, "matmul_rate", lambda device: 80e12)
    return replace(host, device=CUDA, gpus=(TorchGPU(0, "gfx1100", "RX 7900 XTX", False, 96, 24 << 30),))


def test_speeds_beside_the_data_sheet(radeon: Host) -> None:
    [found] = bandwidth(radeon)
    assert (found.value, found.level) == ("800 GB/s, 83% of 960 (RX 7900 XTX)", "ok")
    assert found.data == {"measured": 800.0, "expected": 960, "unit": "GB/s"}
    [found] = matrix_rate(radeon)
    assert (found.value, found.level) == ("80 TFLOP/s, 65% of 122.9 (RX 7900 XTX)", "ok")


def test_slow_ones_are_warned_of(radeon: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a Strix Halo without hipBLASLt: 5.1 of 59.4.
    monkeypatch.setattr(doctor, "matmul_rate", lambda device: 10e12)
    monkeypatch.setattr(doctor, "read_bandwidth", lambda device: 400e9)
    for check, fix in ((matrix_rate, "TORCH_BLAS_PREFER_HIPBLASLT=1"), (bandwidth, "something else using the GPU")):
        [found] = check(radeon)
        assert found.level == "warning"
        assert fix in found.fix


def test_another_part_of_the_architecture_has_no_data_sheet(radeon: Host) -> None:
    [gpu] = radeon.gpus
    [found] = bandwidth(replace(radeon, gpus=(replace(gpu, units=84),)))
    assert found.value == "800 GB/s"


def test_blas_that_is_wrong(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Verdict("hipBLASLt", "bfloat16", 512, "wrong", "off by 3")
    good = [Verdict("rocBLAS", "bfloat16", rows, "right") for rows in gemm.ROWS]
    known = Verdicts("gfx1201", "7.2", "2.11", ("hipBLASLt", "rocBLAS", "Triton"), (bad, *good))
    monkeypatch.setattr(doctor, "verdicts", lambda device: known)
    order, wrong = known_blas(host)
    assert order.value == "hipBLASLt, rocBLAS (right), Triton"
    assert (wrong.level, wrong.value) == ("warning", "wrong for bfloat16 to 512 rows off by 3")
    assert wrong.fix.startswith("nothing need be done, rocBLAS is used")


def test_a_probe_that_fails_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    monkeypatch.setattr(
        doctor, "ensure", lambda device: warnings.warn("BLAS libraries could not be tried", stacklevel=1)
    )
    first, *_ = doctor.blas(host)
    assert (first.level, first.value) == ("warning", "BLAS libraries could not be tried")


def test_numerics_that_are_wrong(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check", lambda model: [Fault("model.layers.0.mlp", "experts", 72, torch.inf)])
    found = list(numerics(host))
    assert [finding.level for finding in found] == ["error"] * 3
    assert found[0].value.startswith("model.layers.0.mlp: experts, 72 rows, off by inf times")
    assert found[0].data["error"] == 1e300  # JSON knows no infinity


def test_numerics_that_cannot_be_had(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(model: Any) -> list[Fault]:
        raise RuntimeError("HIP error: invalid device function")

    monkeypatch.setattr(doctor, "check", raises)
    assert {(f.level, f.value) for f in numerics(host)} == {
        ("error", "failed with RuntimeError: HIP error: invalid device function")
    }


def test_without_triton(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "triton_there", lambda: False)
    assert list(compiler(host)) == []


@NO_GPU
def test_the_interpreter_is_no_compiler(host: Host) -> None:
    folder, found = compiler(host)
    assert folder.name == "kernel cache"
    assert found.level == "warning"


@NO_GPU
@pytest.mark.parametrize(
    ("error", "level", "text"),
    [
        ("", "ok", "a kernel was compiled for gfx1151 in "),
        ("CompilationError: no", "warning", "fails for gfx1151: Comp"),
    ],
)
def test_compiling_for_another(error: str, level: str, text: str, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from gfxlm.kernels import codegen

    asked = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(codegen, "compile_job", lambda job: asked.append(job) or SimpleNamespace(error=error))
    _, found = compiler(host)
    assert (found.level, found.value[: len(text)]) == (level, text)
    assert [(job.arch, job.case) for job in asked] == [("gfx1151", "rms_norm/1x2048")]


def test_a_cache_that_cannot_be_written(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/kernels")
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    folder, *_ = compiler(host)
    assert (folder.level, folder.value) == ("warning", "/proc/kernels: cannot be written")


@NO_GPU
def test_nothing_to_record_on(host: Host) -> None:
    assert [finding.value for finding in graph(host)] == ["there is no GPU to record on"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = this_host(torch.device("cuda"))
    [found] = graph(on_gpu)
    assert (found.level, found.value[:5]) == ("ok", "yes: ")
    monkeypatch.setenv("GFXLM_NO_GRAPH", "1")
    [found] = graph(on_gpu)
    assert found.level == "warning"
    assert "GFXLM_NO_GRAPH is set" in found.value


def test_a_check_that_raises_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(host: Host) -> Iterator[Finding]:
        raise OSError("no")

    for name in ("known_blas", "compiler", "graph", "main_numerics"):
        monkeypatch.setattr(doctor, name, raising)
    found = list(diagnose(CPU, quick=True))
    assert [finding.value for section, finding in found if section in ("kernels", "numerics")] == [
        "failed with OSError: no"
    ] * 4


@pytest.mark.parametrize("name", AMD)
def test_decisions_of_every_amd_target(name: str) -> None:
    found = decisions(named(name))
    assert found["facts"]["like"] == named(name).example
    assert ("arena" in found["memory"]["weights"]) == (name in ("gfx1103", "gfx1150", "gfx1151", "gfx1152"))
    kernels = named(name).kernels
    assert found["BLAS"]["order"] == "hipBLASLt, rocBLAS" + (", Triton" if kernels else "")
    assert ("regimes" in found) == kernels
    if kernels:
        assert any(value.startswith("matvec ") for value in found["tiles"].values())
        assert all("to" in value for key, value in found["regimes"].items() if key != "pages")
        assert "attention" in found["tables"]["portable"]


def test_decisions_differ_where_the_hardware_does() -> None:
    halo, mi300 = decisions(named("gfx1151")), decisions(named("gfx942"))
    assert halo["tiles"] != mi300["tiles"]
    assert halo["memory"] != mi300["memory"]


def test_decisions_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gfxlm.engine.decisions.triton_there", lambda: False)
    assert "tiles" not in decisions(named("gfx1151"))
