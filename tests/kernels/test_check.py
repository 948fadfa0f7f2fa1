"""The manifest: that it is of today's kernels, and that it notices when they change."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gfxlm.device.arch import named
from gfxlm.kernels import gates, manifest
from tests.kernels.compiled import ROOT, run_python

STALE = """
import json
from gfxlm.kernels.check import stale
print(json.dumps(stale()))
"""

SAMPLE = """
import json, sys
from gfxlm.kernels.check import differences, sample
from gfxlm.kernels.cases import catalogue
from gfxlm.kernels.codegen import Job, compile_all
from gfxlm.kernels.manifest import HEADLINE_TARGETS, TARGETS

if __name__ == "__main__":
    chosen = [Job(arch, topic, case.name) for topic, cases in catalogue().items()
              for case in cases if case.headline for arch in HEADLINE_TARGETS]
    chosen += [job for job in sample(TARGETS, int(sys.argv[2]), sys.argv[1]) if job not in chosen]
    found = [line for done in compile_all(chosen) for line in differences(done)]
    print(json.dumps([len(chosen), sorted(found)]))
"""

UPDATE = """
import json
from pathlib import Path
from gfxlm.kernels import check
told = []
complaints = check.update(("gfx1100",), None, 1, lambda done, total: told.append(total), Path("manifest"))
print(json.dumps([complaints, told]))
"""

# Eight times round the loop, for four elements a lane: four additions, two of them in one instruction at best.
COUNT = """
import json
from gfxlm.device.arch import named
from gfxlm.kernels.assembly import count
from gfxlm.kernels.record import record
from tests.kernels.toy import TOY

def vector(name):
    arch = named(name)
    code = record(TOY, arch)[0].specialize(arch)
    return count(code, code.compile(), arch, walked=True).vector

print(json.dumps([vector(name) for name in ("gfx90a", "gfx942", "gfx1100", "gfx1151", "gfx1201")]))
"""


def test_executed_instructions() -> None:
    assert all(8 * 2 <= vector <= 8 * 40 for vector in run_python(COUNT))


# What is stale after each replacement in the toy's source, alone.
MUTATE = """
import importlib, json, linecache, sys
from pathlib import Path
from gfxlm.kernels import cases, check

path = Path("gfxlm/kernels/cases/toy.py")
original = path.read_text()
found = []
for old, new in json.loads(sys.argv[1]):
    assert old in original, old
    path.write_text(original.replace(old, new))
    sys.modules.pop("gfxlm.kernels.cases.toy", None)
    linecache.clearcache()
    importlib.invalidate_caches()
    cases._cases.cache_clear()
    found.append(check.stale(("gfx1100",), Path("manifest")))
print(json.dumps(found))
"""


def test_the_manifest_is_of_todays_kernels() -> None:
    found = run_python(STALE)
    assert not found, f"{len(found)} cases are not what the manifest is of ({found[0]}, ...): run `make codegen`"


@pytest.mark.parametrize("arch", manifest.TARGETS)
def test_the_manifest_holds_no_failure(arch: str) -> None:
    cases = manifest.read(arch)["cases"]
    assert [f"{name}: {line}" for name in cases for line in gates.failures(cases[name], named(arch))] == []


@pytest.mark.slow
def test_headline_cases_and_a_sample_compile_to_what_the_manifest_says() -> None:
    seed = os.environ.get("GFXLM_SAMPLE") or "".join(
        row["source"] for entry in manifest.read("gfx1151")["cases"].values() for row in entry["launches"]
    )
    _, found = run_python(SAMPLE, seed, "12", timeout=600)
    assert found == []


def toy_cases() -> str:
    return (ROOT / "tests/kernels/toy.py").read_text() + "\n\ndef cases() -> list[Case]:\n    return [TOY]\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package without its cases and record, and one topic of a small kernel."""
    ignored = shutil.ignore_patterns("__pycache__", "data", "manifest")
    shutil.copytree(ROOT / "gfxlm", tmp_path / "gfxlm", ignore=ignored)
    for path in (tmp_path / "gfxlm/kernels/cases").glob("[a-z]*.py"):
        path.unlink()
    (tmp_path / "gfxlm/kernels/cases/toy.py").write_text(toy_cases())
    return tmp_path


def test_a_change_of_a_kernel_is_noticed(copy: Path) -> None:
    changes = {
        ("x * FACTOR", "FACTOR * x"): True,
        ("constexpr(2)", "constexpr(3)"): True,
        ("tl.sum(acc, 0)", "tl.max(acc, 0)"): True,
        ("num_warps: int = 1", "num_warps: int = 2"): True,
        ("BLOCK=128", "BLOCK=64"): True,
        ("torch.zeros(4, 1000", "torch.zeros(4, 1024"): True,
        ('"""Two times x."""', '"""Twice x."""'): False,
        ("acc = tl.zeros", "# in fp32\n    acc = tl.zeros"): False,
        ("FACTOR = ", "\n\nFACTOR = "): False,
        ("acc += twice(", "acc += twice(\n        "): False,
        ("        acc += ", "        if start == 0:\n            acc += "): True,
    }
    renamed = ('"toy/4x1000"', '"toy/other"')

    def stale() -> Any:
        return run_python(MUTATE, json.dumps([*changes, renamed]), root=copy, PYTHONDONTWRITEBYTECODE="1")

    missing = ["gfx1100: toy/4x1000"]
    assert stale() == [missing] * len(changes) + [["gfx1100: toy/other"]]
    (copy / "gfxlm/kernels/cases/toy.py").write_text(toy_cases())
    run_python(UPDATE, root=copy)
    *found, after_renaming = stale()
    assert found == [missing if is_stale else [] for is_stale in changes.values()]
    assert after_renaming == ["gfx1100: toy/other", "gfx1100: toy/4x1000 is no longer a case"]


def test_counts_of_a_compiled_case(copy: Path) -> None:
    assert run_python(UPDATE, root=copy) == [[], [1]]
    record = manifest.read("gfx1100", copy / "manifest")
    [row] = record["cases"]["toy/4x1000"]["launches"]
    assert row["kernel"] == "total_kernel"
    assert (row["spills"], row["lds"] <= 1024, row["dots"], row["matrix"]) == (0, True, "", 0)
    assert row["programs"] == 4
    assert row["vector"] is None  # it is counted for matrix-vector products
    # What is written down already is not compiled again.
    assert run_python(UPDATE, root=copy) == [[], []]


def row(**changed: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("spills", "scalar_spills", "lds", "matrix"), 0)
    return {
        "kernel": "k",
        **nothing,
        "dots": "",
        "wide_loads": 4,
        "vector": 1,
        "num_warps": 1,
        "programs": 1,
        **changed,
    }


def complaints(arch: str, topic: str = "wide", nbytes: int = 0, **changed: Any) -> list[str]:
    entry = {"topic": topic, "nbytes": nbytes, "flops": nbytes, "launches": [row(**changed)]}
    return gates.failures(entry, named(arch))


def test_gates() -> None:
    assert complaints("gfx1151") == []
    assert complaints("gfx1151", spills=3) == ["k: 3 registers spilled"]
    assert complaints("gfx1151", scalar_spills=1) == ["k: 1 scalar registers spilled"]
    assert complaints("gfx1151", lds=65537) == ["k: 65537 bytes of LDS, of 65536"]
    assert complaints("gfx950", lds=65537) == []
    assert complaints("gfx1100", dots="bf16") == ["k: tl.dot of bf16 without matrix instructions"]
    assert complaints("gfx1100", dots="bf16", matrix=1) == []
    assert complaints("gfx1100", dots="f32") == []
    assert complaints("gfx942", dots="f32") == ["k: tl.dot of f32 without matrix instructions"]


def test_gates_of_matrix_vector_kernels() -> None:
    nbytes = 6_400_000  # in whose time a gfx1100 issues 102,400,000 lanes' instructions
    assert complaints("gfx1100", "matvec", nbytes, vector=16, programs=3_000_000 // 32) == []
    assert complaints("gfx1100", "matvec", nbytes, vector=17, programs=3_200_000 // 32) == [
        "vector instructions take 53% of the time of the bytes"
    ]
    assert complaints("gfx1201", "matvec", nbytes, vector=17, programs=3_200_000 // 32) == []
    assert complaints("gfx1100", "matvec", nbytes // 100, vector=17, programs=1000) == []
    assert complaints("gfx1151", "matvec", nbytes, wide_loads=0) == ["no load of 16 bytes a lane"]
    assert complaints("gfx1151", "matvec", nbytes, dots="f16", matrix=1, wide_loads=0) == []
    assert complaints("gfx1151", "matvec", 0, wide_loads=0) == []
    assert "cannot be counted" in complaints("gfx942", "matvec", nbytes, vector=None)[0]


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    record = {
        "triton": "3.9.0",
        "cases": {"b/1": {"topic": "b", "nbytes": 1, "launches": [row(), row()]}, "a/1": {"flops": 0, "launches": []}},
    }
    manifest.write("gfx1100", record, tmp_path / "new")
    assert manifest.read("gfx1100", tmp_path / "new") == record
    assert json.loads((tmp_path / "new/gfx1100.json").read_text()) == record
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["gfx1100.json"]
