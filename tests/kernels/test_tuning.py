"""Tables of tile sizes: which rule holds, whose table serves, and what `gfxlm tune` puts in front."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfxlm.device.arch import ARCHITECTURES, PORTABLE, Architecture, assume, named
from gfxlm.kernels import tuning

CPU = torch.device("cpu")
FACTS = ("rows", "columns", "kind")
VALUES = st.one_of(st.integers(0, 6), st.sampled_from(["a", "b"]), st.booleans())
RANGES = st.tuples(st.none() | st.integers(0, 6), st.none() | st.integers(0, 6)).map(list)
RULES = st.lists(
    st.fixed_dictionaries(
        {"use": st.fixed_dictionaries({"tile": st.integers()})},
        optional={
            "when": st.fixed_dictionaries(
                {},
                optional={"rows": st.integers(0, 6) | RANGES, "columns": RANGES, "kind": st.sampled_from(["a", "b"])},
            )
        },
    ),
    max_size=5,
)


def holds(wanted: Any, value: Any) -> bool:
    if not isinstance(wanted, list):
        return bool(wanted == value)
    return value >= (wanted[0] if wanted[0] is not None else -1) and value <= (
        wanted[1] if wanted[1] is not None else 9
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tables in place of the package's, and no user's."""
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path / "shipped")
    monkeypatch.setenv("GFXLM_CONFIGS", str(tmp_path / "user"))
    tuning.forget()
    yield tmp_path
    tuning.forget()


def write(folder: Path, op: str, content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{op}.json").write_text(json.dumps(content))


@given(rules=RULES, rows=st.integers(0, 6), columns=st.integers(0, 6), kind=st.sampled_from(["a", "b"]))
def test_the_first_rule_that_holds(rules: list[dict[str, Any]], rows: int, columns: int, kind: str) -> None:
    facts = {"rows": rows, "columns": columns, "kind": kind}
    expected = [
        rule["use"] for rule in rules if all(holds(want, facts[fact]) for fact, want in rule.get("when", {}).items())
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_table", lambda op, arch: ({}, rules))
        tuning._lookup.cache_clear()
        if expected:
            assert tuning.config("op", CPU, **facts) == expected[0]
        else:
            with pytest.raises(LookupError, match="op: no rule for"):
                tuning.config("op", CPU, **facts)
    tuning._lookup.cache_clear()


def test_own_table_then_the_familys_then_the_portable_one(folder: Path) -> None:
    def used(arch: Architecture) -> int:
        tuning.forget()
        with assume(arch):
            return int(tuning.config("op", CPU)["tile"])

    for number, place in enumerate(("portable", "gfx11", "gfx1151")):
        write(folder / "shipped" / place, "op", {"rules": [{"use": {"tile": number}}]})
    assert [used(arch) for arch in (PORTABLE, named("gfx1201"), named("gfx1100"), named("gfx1151"))] == [0, 0, 1, 2]


def test_without_a_table(folder: Path) -> None:
    with pytest.raises(LookupError, match="there is no table"):
        tuning.config("op", CPU)


def test_what_is_returned_is_the_callers_own(folder: Path) -> None:
    write(folder / "shipped" / "portable", "op", {"rules": [{"use": {"tile": 1}}]})
    tuning.config("op", CPU)["tile"] = 2
    assert tuning.config("op", CPU) == {"tile": 1}


def test_override_and_asking(folder: Path) -> None:
    write(folder / "shipped" / "portable", "op", {"rules": [{"use": {"tile": 1}}]})
    with tuning.asking() as asked, tuning.override("op", {"tile": 2}):
        assert tuning.config("op", CPU, rows=3) == {"tile": 2}
    assert asked == [("op", (("rows", 3),))]
    assert tuning.config("op", CPU, rows=3) == {"tile": 1}


def test_a_measured_table_comes_first(folder: Path) -> None:
    shipped = [{"use": {"tile": 1}}]
    write(folder / "shipped" / "portable", "op", {"rules": shipped})
    measured = {"against": tuning.fingerprint(shipped), "rules": [{"when": {"rows": 1}, "use": {"tile": 8}}]}
    write(folder / "user" / "gfx1151", "op", measured)
    with assume(named("gfx1151")):
        assert tuning.config("op", CPU, rows=1) == {"tile": 8}
        assert tuning.config("op", CPU, rows=2) == {"tile": 1}
    with assume(named("gfx1100")):
        assert tuning.config("op", CPU, rows=1) == {"tile": 1}


@pytest.mark.parametrize("content", [{"against": "another", "rules": []}, {"rules": []}, [], "text"])
def test_a_measured_table_that_does_not_fit_is_not_used(folder: Path, content: object) -> None:
    write(folder / "shipped" / "portable", "op", {"rules": [{"use": {"tile": 1}}]})
    write(folder / "user" / "portable", "op", content)
    with pytest.warns(UserWarning, match=r"op\.json .* is not used; gfxlm tune writes it anew"):
        assert tuning.config("op", CPU) == {"tile": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.config("op", CPU)


@pytest.mark.parametrize(
    "rules", [5, ["text"], [{"use": {"tile": 8}}], [{"when": {"rows": [1, 2]}, "use": {"tile": 8}}],
              [{"when": {"rows": 1}, "use": {"file": 8}}], [{"when": {"rows": 1}, "use": 8}]],
)  # fmt: skip
def test_a_measured_table_of_another_form_is_not_used(folder: Path, rules: object) -> None:
    shipped = [{"use": {"tile": 1}}]
    write(folder / "shipped" / "portable", "op", {"rules": shipped})
    write(folder / "user" / "portable", "op", {"against": tuning.fingerprint(shipped), "rules": rules})
    with pytest.warns(UserWarning, match=r"op\.json cannot be read .* is not used"):
        assert tuning.config("op", CPU, rows=1) == {"tile": 1}


def test_a_measured_table_of_other_facts_says_nothing(folder: Path) -> None:
    shipped = [{"use": {"tile": 1}}]
    write(folder / "shipped" / "portable", "op", {"rules": shipped})
    rules = [{"when": {"lines": 1}, "use": {"tile": 8}}]
    write(folder / "user" / "portable", "op", {"against": tuning.fingerprint(shipped), "rules": rules})
    assert tuning.config("op", CPU, rows=1) == {"tile": 1}


def test_where_measured_tables_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFXLM_CONFIGS", "")
    assert tuning.user_configs() is None
    monkeypatch.delenv("GFXLM_CONFIGS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert tuning.user_configs() == Path("/elsewhere/gfxlm/configs")


def tables() -> list[Path]:
    return [path for path in sorted(tuning.CONFIGS.rglob("*.json")) if not path.name.endswith(".space.json")]


@pytest.mark.parametrize("path", tables(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_tables_are_well_formed(path: Path) -> None:
    assert path.parent.name in {"portable", *ARCHITECTURES, *(arch.family for arch in ARCHITECTURES.values())}
    rules = json.loads(path.read_text())["rules"]
    assert all(set(rule) <= {"when", "use"} and isinstance(rule["use"], dict) for rule in rules)
    assert "when" not in rules[-1], "the last rule must hold always"
    amd_only = {"waves_per_eu", "matrix_instr_nonkdim"}
    if not path.parent.name.startswith("gfx"):
        assert not any(name in json.dumps(rules) for name in amd_only)
    assert (tuning.CONFIGS / "portable" / path.name).is_file(), "every operation has a portable table"
