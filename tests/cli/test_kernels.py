"""`gfxlm kernels`, `warmup` and `tune`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gfxlm.cli import gpu
from gfxlm.kernels import manifest
from tests.cli.runner import complaint, run

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")

ROW: dict[str, Any] = {
    "kernel": "total_kernel",
    "key": "0" * 12,
    "source": "1" * 12,
    "num_warps": 2,
    "vgprs": 77,
    "sgprs": 30,
    "spills": 0,
    "scalar_spills": 0,
    "lds": 512,
    "scratch": 0,
    "occupancy": 12,
    "wide_loads": 4,
    "matrix": 0,
    "dots": "",
    "vector": 100,
    "programs": 4096,
}


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A record of two cases for gfx1151 and nothing else."""
    cases = {
        # 100 instructions of 64 lanes, 4096 times, for 4096² weights.
        "matvec/1": {"topic": "matvec", "nbytes": 4096**2 * 9 // 16, "flops": 2 * 4096**2, "launches": [ROW]},
        "other/1": {"topic": "others", "nbytes": 1, "flops": 1, "launches": [ROW | {"spills": 7}]},
    }
    manifest.write("gfx1151", {"triton": "3.9.0", "cases": cases}, tmp_path)
    monkeypatch.setattr(manifest.read, "__defaults__", (tmp_path,))
    return cases


def test_the_table(recorded: dict[str, Any]) -> None:
    lines = run("kernels", "--arch", "gfx1151").stdout.splitlines()
    assert lines[0] == "gfx1151, wave 32; shares are of a Radeon 8060S, 256 GB/s"
    assert " ".join(lines[1].split()) == "warps VGPRs SGPRs spills LDS waves/SIMD 16-byte loads matrix instr."
    assert lines[2] == "matvec/1: 1.56 vector instructions a weight, 10% of the bytes' time"
    assert " ".join(lines[3].split()) == "total_kernel 2 77 30 0 512 12 4 0"
    assert lines[4] == "other/1"
    assert lines[6:] == ["  fails: total_kernel: 7 registers spilled"]


@pytest.mark.parametrize("op", ["other", "others", "other/1"])
def test_some_of_the_table_as_json(recorded: dict[str, Any], op: str) -> None:
    found = json.loads(run("kernels", "--arch", "gfx1151", "--op", op, "--json").stdout)
    judged = {"per_weight": None, "vector_share": None, "failures": ["total_kernel: 7 registers spilled"]}
    assert found["cases"] == {"other/1": recorded["other/1"] | judged}
    assert (found["arch"], found["example"]) == ("gfx1151", "Radeon 8060S")


def test_what_is_not_there(recorded: dict[str, Any]) -> None:
    assert "'gfx9999' is not known; known are gfx90a" in complaint("kernels", "--arch", "gfx9999")
    assert complaint("kernels", "--arch", "gfx1100") == "gfx1100: there is no record of it; --compile makes one"
    assert "counted for AMD only" in complaint("kernels", "--arch", "sm_90")
    assert "no kernels for gfx1030" in complaint("kernels", "--arch", "gfx1030")
    message = complaint("kernels", "--arch", "gfx1151", "--op", "mat")
    assert message == "no case is called 'mat'; known are matvec, other, others"


@no_gpu
@pytest.mark.parametrize("command", ["kernels", "warmup"])
def test_without_a_gpu_an_architecture_must_be_named(command: str) -> None:
    assert complaint(command).startswith("there is no GPU here: name an architecture with --arch, of gfx90a, gfx942,")


@no_gpu
def test_tuning_needs_a_gpu() -> None:
    assert complaint("tune") == "there is no GPU here, and nothing to measure"


@pytest.mark.parametrize("arguments", [["warmup"], ["kernels", "--compile"]])
def test_without_triton(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    message = complaint(*arguments, "--arch", "gfx1151")
    assert message.startswith("Triton is not installed")
    assert message.endswith("pip install triton")


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert complaint("warmup", "--arch", "gfx1151").startswith("TRITON_INTERPRET is set")


def gfxlm(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gfxlm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.mark.slow
def test_warming_up_twice_compiles_once(tmp_path: Path) -> None:
    first = gfxlm("warmup", "--arch", "gfx1151", "--op", "moe_route", "-j", "1", cache=tmp_path)
    assert first.returncode == 0, first.stderr
    name, compiled = first.stdout.split()[:2]
    assert name == "gfx1151:"
    assert int(compiled) > 0
    second = gfxlm("warmup", "--arch", "gfx1151", "--op", "moe_route", "-j", "1", cache=tmp_path)
    assert second.stdout.startswith("gfx1151: 0 kernels compiled for")


def test_an_unknown_case() -> None:
    # Found out before anything is compiled.
    done = gfxlm("warmup", "--arch", "gfx1151", "--op", "nonsense", cache=Path("unused"))
    assert done.returncode == 2
    assert done.stderr.startswith("gfxlm: error: no case is called 'nonsense'; known are")
