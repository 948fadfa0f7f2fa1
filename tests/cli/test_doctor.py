"""`gfxlm doctor`: its text, its JSON, its exit code."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gfxlm.device.finding import Finding
from gfxlm.engine import doctor
from tests.cli.runner import complaint, run

FINDINGS = [
    ("system", Finding("kernel", "6.18.4")),
    ("system", Finding("HSA_OVERRIDE_GFX_VERSION", "11.0.0", "warning", "unset it")),
    ("numerics", Finding("bfloat16", "right", data={"seconds": 1.0})),
]
WRONG = ("numerics", Finding("float16", "off by inf", "error", "try a newer driver"))


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Findings of a machine; and what was asked."""
    found: list[Any] = list(FINDINGS)

    def diagnose(device: torch.device, *, quick: bool = False) -> Iterator[Any]:
        yield from found

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    return found


@pytest.mark.usefixtures("says")
def test_text() -> None:
    done = run("doctor")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "system",
        "  kernel             6.18.4",
        "! HSA_OVERRIDE_GFX_VERSION 11.0.0",
        "                     -> unset it",
        "numerics",
        "  bfloat16           right",
        "no errors, 1 warning",
    ]


@pytest.mark.usefixtures("says")
def test_json() -> None:
    done = run("doctor", "--json")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert said["ok"] is True
    assert said["system"][1] == {
        "name": "HSA_OVERRIDE_GFX_VERSION",
        "value": "11.0.0",
        "level": "warning",
        "fix": "unset it",
        "data": {},
    }
    assert said["numerics"][0]["data"] == {"seconds": 1.0}
    assert said["decisions"] == {}


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_wrong_numbers_are_exit_code_1(arguments: list[str], says: list[Any]) -> None:
    says.append(WRONG)
    done = run("doctor", *arguments)
    assert done.exit_code == 1
    assert "off by inf" in done.stdout


def test_on_this_machine() -> None:
    done = run("doctor", "--quick", "--device", "cpu")
    assert done.exit_code == 0, done.stdout
    assert [line for line in done.stdout.splitlines() if not line.startswith((" ", "!"))][:3] == [
        "system", "devices", "memory",
    ]  # fmt: skip
    assert "every kind of layer, the head and the sampler compute what they should" in done.stdout


@pytest.mark.usefixtures("says")
def test_decisions_follow_where_an_architecture_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFXLM_ASSUME_ARCH", "gfx1151")
    text = run("doctor").stdout
    assert "arena: hipExtMallocWithFlags" in text
    assert text.endswith("no errors, 1 warning\n")
    assert json.loads(run("doctor", "--json").stdout)["decisions"]["gfx1151"]["facts"]["kind"] == "integrated"


def test_decisions_on_demand() -> None:
    said = json.loads(run("doctor", "--arch", "gfx1151", "--arch", "gfx1100", "--json").stdout)
    assert list(said) == ["gfx1151", "gfx1100"]
    lines = run("doctor", "--arch", "gfx1030").stdout.splitlines()
    assert lines[0] == "gfx1030"
    assert "kernels none: plain torch" in {" ".join(line.split()) for line in lines}


def test_decisions_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gfxlm.engine.decisions.decisions", lambda arch: {"facts": {"like": arch.example}})
    lines = run("doctor", "--arch", "all").stdout.splitlines()
    assert [line for line in lines if line.startswith("gfx")][:3] == ["gfx90a", "gfx942", "gfx950"]
    assert sum(line.startswith("gfx") for line in lines) == 13


def test_bad_names() -> None:
    assert complaint("doctor", "--arch", "gfx1").startswith("architecture 'gfx1' is not known; known are gfx90a")
    assert complaint("doctor", "--device", "gpu").startswith("device 'gpu'")
