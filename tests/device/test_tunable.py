"""What TunableOp measured is kept for the next process. On a stand-in for it: torch has none on a CPU."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gfxlm.device import gemm, tunable
from gfxlm.device.arch import assume, named
from gfxlm.device.gemm import HIPBLASLT, Verdict

CPU = torch.device("cpu")


class StandIn:
    """torch.cuda.tunable, in one process."""

    def __init__(self, version: str = "1") -> None:
        self.version = version
        self.results: list[tuple[str, str, str, float]] = []
        self.enabled = self.tuning = False
        self.filename = "tunableop_results0.csv"

    def enable(self, wanted: bool) -> None:
        self.enabled = wanted

    def tuning_enable(self, wanted: bool) -> None:
        self.tuning = wanted

    def set_numerical_check_tolerances(self, wanted: bool, atol: float, rtol: float) -> None:
        assert wanted
        assert 0 < rtol < atol < 1

    def set_filename(self, name: str) -> None:
        self.filename = name

    def get_validators(self) -> list[tuple[str, str]]:
        return [("PT_VERSION", self.version), ("GCN_ARCH_NAME", "gfx942:sramecc+")]

    def get_results(self) -> list[tuple[str, str, str, float]]:
        return self.results

    def read_file(self, name: str) -> bool:
        lines = [line.split(",") for line in Path(name).read_text().splitlines()]
        if [line[1:] for line in lines if line[0] == "Validator"] != [list(v) for v in self.get_validators()]:
            return False
        self.results = [(a, b, c, float(d)) for a, b, c, d in (line for line in lines if line[0] != "Validator")]
        return True

    def multiply(self, size: str) -> None:
        assert self.enabled
        if self.tuning and size not in {known for _, known, _, _ in self.results}:
            self.results.append(("GemmTunableOp_BFloat16_TN", size, "Gemm_Hipblaslt_7", 0.25))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    gemm.forget()
    with assume(named("gfx942")):
        yield started(monkeypatch)


def started(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> StandIn:
    """A new process."""
    found = StandIn(**facts)
    monkeypatch.setattr(tunable, "tunable", found)
    return found


def test_results_are_loaded_by_the_next_process(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tunable.load(CPU)
    assert not stand_in.enabled
    path = tunable.record(CPU, lambda: stand_in.multiply("tn_1_2_3"))
    assert "gfx942" in path.name
    assert not stand_in.tuning
    later = started(monkeypatch)
    assert tunable.load(CPU)
    assert (later.enabled, later.tuning, later.results) == (True, False, stand_in.results)
    assert Path(later.filename).parent == path.parent  # and not in whatever folder the user is in


def test_later_results_are_added(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable.record(CPU, lambda: stand_in.multiply("tn_1_2_3"))
    later = started(monkeypatch)
    path = tunable.record(CPU, lambda: later.multiply("tn_4_5_6"))
    assert [size for _, size, _, _ in later.results] == ["tn_1_2_3", "tn_4_5_6"]
    assert path.read_text().count("Hipblaslt") == 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_work_that_fails_leaves_the_file(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tunable.record(CPU, lambda: stand_in.multiply("tn_1_2_3"))
    before = path.read_text()

    def work() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        tunable.record(CPU, work)
    assert path.read_text() == before
    assert not stand_in.tuning


@pytest.mark.parametrize("damage", ["", "GemmTunableOp", "another version"])
def test_what_torch_refuses_is_not_used(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    path = tunable.record(CPU, lambda: stand_in.multiply("tn_1_2_3"))
    later = started(monkeypatch, version="2" if damage == "another version" else "1")
    if damage != "another version":
        path.write_text(damage)
    with pytest.warns(UserWarning, match=r"\.csv is not used: it is damaged, or another version's"):
        assert not tunable.load(CPU)
    assert not later.enabled


def test_a_library_that_is_wrong_is_not_measured(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tunable._SWITCHES.values():
        monkeypatch.setenv(name, "1")
    tunable.record(CPU, lambda: stand_in.multiply("tn_1_2_3"))
    started(monkeypatch)
    replace(gemm.untried(CPU), found=(Verdict(HIPBLASLT, "float16", 32, "wrong"),)).save()
    assert "Hipblaslt" not in tunable.record(CPU, lambda: None).read_text()
    assert [os.environ[name] for name in tunable._SWITCHES.values()] == ["0", "1"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torchs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device, x = torch.device("cuda", 0), torch.randn(64, 64, device="cuda")
    try:
        path = tunable.record(device, lambda: x @ x)
        assert path.read_text().startswith("Validator,")
        assert tunable.load(device)
    finally:
        torch.cuda.tunable.enable(False)
