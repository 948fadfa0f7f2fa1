"""`gfxlm tune --blas`: what it says of the libraries that were tried."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gfxlm.device import gemm, gemm_probe, select
from gfxlm.device.arch import assume, named
from gfxlm.device.gemm import CUBLAS, Verdict
from gfxlm.device.gemm_probe import ProbeError
from gfxlm.kernels import tuner
from tests.cli.runner import complaint, run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that can be named, and not used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu() -> None:
    assert complaint("tune", "--blas") == "there is no GPU here, and nothing to measure"


@pytest.mark.parametrize("option", [["--op", "wide"], ["--output", "folder"]])
def test_what_does_not_go_together(gpu: None, option: list[str]) -> None:
    assert complaint("tune", "--blas", *option).startswith("--blas: ")


def test_verdicts_are_told(gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verdict = Verdict(CUBLAS, "float16", 512, "wrong", "512x64x96: off by 0.3 of the largest number")

    def tried(device: torch.device, **_: Any) -> gemm.Verdicts:
        with assume(named("sm_90")):
            return replace(gemm.untried(device), found=(verdict,))

    monkeypatch.setattr(gemm_probe, "probe", tried)
    done = run("tune", "--blas")
    assert "sm_90" in done.stdout
    assert (
        "cuBLAS: float16: wrong (512x64x96: off by 0.3 of the largest number); cuBLASLt serves instead" in done.stderr
    )
    assert "nothing to record" in done.stderr


def test_a_probe_that_does_not_start(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: torch.device) -> None:
        raise ProbeError("out of memory")

    monkeypatch.setattr(gemm_probe, "probe", refused)
    assert run("tune", "--blas").stderr.endswith("error: the BLAS libraries could not be tried: out of memory\n")


def test_the_graphics_card_is_tuned_not_the_gpu_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(select, "best_gpu", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "set_device", tried.append)
    monkeypatch.setattr(tuner, "tunable", lambda: ["toy"])
    monkeypatch.setattr(tuner, "tune", lambda op, device: tried.append(device) or [])
    run("tune", "--output", "nowhere")
    assert tried == [torch.device("cuda", 1)] * 2
