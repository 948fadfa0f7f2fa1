"""The search for the fastest values, with a clock that says what it is told."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gfxlm.device.arch import PORTABLE, assume, named
from gfxlm.errors import UserError
from gfxlm.kernels import tuner, tuning
from gfxlm.kernels.case import Case

CPU = torch.device("cpu")
USED = {"tile": 16, "method": "a", "options": {"num_warps": 4}}
SPACE = {"tile": [8, 16, 32, 64], "method": ["a", "wrong", "fails"], "options.num_warps": [1, 2, 4], "unused": [1]}


def make(device: torch.device) -> Callable[[], Tensor]:
    x = torch.randn(5, device=device)

    def call() -> Tensor:
        values = tuning.config("toy", device, rows=5)
        if values["method"] == "fails":
            raise RuntimeError("out of shared memory")
        return x + 1 if values["method"] == "wrong" else x

    return call


def time(calls: list[Callable[[], object]]) -> float:
    """In favour of large tiles and two warps, and of whatever is wrong."""
    values = tuning.config("toy", CPU, rows=5)
    warps = values["options"]["num_warps"]
    return 100 / values["tile"] + abs(warps - 2) - 50 * (values["method"] != "a")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path / "shipped")
    monkeypatch.setenv("GFXLM_CONFIGS", str(tmp_path / "user"))
    (tmp_path / "shipped/portable").mkdir(parents=True)
    (tmp_path / "shipped/portable/toy.json").write_text(json.dumps({"rules": [{"use": USED}]}))
    (tmp_path / "shipped/toy.space.json").write_text(json.dumps(SPACE))
    monkeypatch.setattr(tuner, "catalogue", lambda: {"toys": [Case("toy/5", make), Case("toy/5 again", make)]})
    monkeypatch.setattr(tuner, "microseconds", time)
    monkeypatch.setattr(tuner, "rotated", lambda make, device: [make(device)])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tuning.forget()
    yield tmp_path
    tuning.forget()


@pytest.mark.usefixtures("toy")
def test_the_fastest_of_what_is_right() -> None:
    [result] = tuner.tune("toy", CPU)
    assert result.facts == (("rows", 5),)
    assert (result.before, result.before_us) == (USED, 100 / 16 + 2)
    assert result.best == {"tile": 64, "method": "a", "options": {"num_warps": 2}}
    assert result.best_us == 100 / 64


def test_what_is_written_is_used(toy: Path) -> None:
    path = tuner.write(toy / "user", "toy", CPU, list(tuner.tune("toy", CPU)))
    assert path == toy / "user" / "portable" / "toy.json"
    assert tuning.config("toy", CPU, rows=5)["tile"] == 64
    assert tuning.config("toy", CPU, rows=6) == USED
    with assume(named("gfx1151")):
        assert tuning.config("toy", CPU, rows=5) == USED
    assert PORTABLE.name == "portable"


@pytest.mark.usefixtures("toy")
def test_what_cannot_be_tuned() -> None:
    assert tuner.tunable() == ["toy"]
    with pytest.raises(UserError, match="operation 'other' cannot be tuned; those that can are toy"):
        tuner.space("other")


def spaces() -> list[Path]:
    return sorted(tuning.CONFIGS.glob("*.space.json"))


@pytest.mark.parametrize("path", spaces(), ids=lambda path: path.name)
def test_shipped_spaces_name_what_tables_hold(path: Path) -> None:
    op = path.name.removesuffix(".space.json")
    rules: list[dict[str, Any]] = tuning.shipped_table(op, PORTABLE)
    for name, values in json.loads(path.read_text()).items():
        assert any(tuner._has(rule["use"], name) for rule in rules), name
        assert isinstance(values, list)
        assert values
