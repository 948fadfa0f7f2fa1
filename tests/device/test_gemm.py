"""Verdicts on BLAS libraries: stand-ins that crash, hang, lie and give NaN, and what is made of what is known."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from gfxlm.device import gemm, gemm_probe
from gfxlm.device.arch import ARCHITECTURES, assume, named
from gfxlm.device.gemm import CUBLAS, CUBLASLT, HIPBLASLT, RIGHT, ROCBLAS, ROWS, TRITON, Verdict, Verdicts
from gfxlm.device.gemm_probe import ProbeError, probe

CPU = torch.device("cpu")
SHAPES = [(64, 96), (48, 32)]
STAND_IN = """
import os, sys, time, torch
from gfxlm.device.gemm_probe import serve

def product(x, w, out):
    torch.mm(x.double(), w.double().mT, out=(y := torch.empty(x.shape[0], w.shape[0], dtype=torch.float64)))
    out.copy_(y)
    library = sys.argv[1]
    {behaviour}

{before}
serve(product, torch.device("cpu"))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gemm.forget()


def tried(folder: Path, behaviour: str, before: str = "", arch: str = "gfx1151", limit: float = 60.0) -> Verdicts:
    script = folder / "library.py"
    script.write_text(STAND_IN.format(behaviour=behaviour, before=before))
    with assume(named(arch)):
        return probe(CPU, shapes=SHAPES, command=[sys.executable, str(script)], limit=limit)


def outcomes(found: Verdicts, library: str) -> dict[tuple[str, int], str]:
    return {(v.dtype, v.rows): v.outcome for v in found.found if v.library == library}


def only(dtype: str, rows: int, outcome: str) -> dict[tuple[str, int], str]:
    everything = {(name, m): RIGHT for name in ("bfloat16", "float16", "float32") for m in ROWS}
    return everything | {(dtype, rows): outcome}


@pytest.mark.parametrize(
    ("act", "outcome", "detail"),
    [
        ("os.abort()", "crashed", "512x64x96: status -6"),
        ("os._exit(0)", "crashed", "512x64x96: status 0"),
        ("time.sleep(600)", "hung", "512x64x96: no answer after 6 s"),
        ("out[300, 16] += 1", "wrong", "512x64x96: off by "),
        ("out[300, 17] = torch.nan", "not finite", "512x64x96"),
        ("out.copy_(torch.full_like(out, torch.nan))", "not finite", "512x64x96"),
        ("raise RuntimeError('no algorithm for this\\\\nat all')", "refused", "512x64x96: no algorithm for this"),
        ("raise NotImplementedError('elsewhere')", "absent", "512x64x96: elsewhere"),
    ],
)
def test_a_bad_library_is_marked_for_its_class_alone(tmp_path: Path, act: str, outcome: str, detail: str) -> None:
    bad = "library == 'hipBLASLt' and (out.shape[0], out.dtype) == (512, torch.float16) and out.shape[1] == 64"
    found = tried(tmp_path, f"if {bad}: {act}", limit=6.0 if outcome == "hung" else 60.0)
    assert outcomes(found, HIPBLASLT) == only("float16", 512, outcome)
    assert outcomes(found, ROCBLAS) == only("float16", 512, RIGHT)
    assert [v.detail.startswith(detail) for v in found.found if v.outcome != RIGHT] == [True]
    assert found.chosen(torch.float16, 512) == found.chosen(torch.float16, 33) == ROCBLAS
    assert found.chosen(torch.float16, 513) == found.chosen(torch.bfloat16, 512) == HIPBLASLT
    assert len(found.bad) == (outcome != "absent")


def test_a_lie_where_nobody_wrote(tmp_path: Path) -> None:
    """Memory may hold yesterday's right answer: a library that writes nothing is found out."""
    found = tried(tmp_path, "out.fill_(torch.nan) if library == 'rocBLAS' else None")
    assert set(outcomes(found, ROCBLAS).values()) == {"not finite"}
    assert set(outcomes(found, HIPBLASLT).values()) == {RIGHT}


def test_where_every_library_is_bad(tmp_path: Path) -> None:
    behaviour = "if x.shape[0] == 1: out[0, 0] = 9"
    assert tried(tmp_path, behaviour).chosen(torch.bfloat16, 1) == TRITON
    assert tried(tmp_path, behaviour, arch="sm_90").chosen(torch.bfloat16, 1) == TRITON
    assert tried(tmp_path, behaviour, arch="gfx1030").chosen(torch.bfloat16, 1) == ROCBLAS


def test_one_that_always_dies_is_given_up(tmp_path: Path) -> None:
    found = tried(tmp_path, "if library == 'hipBLASLt': open(__file__ + '.calls', 'a').write('x'), os.abort()")
    assert set(outcomes(found, HIPBLASLT).values()) == {"crashed"}
    assert (tmp_path / "library.py.calls").read_text() == "xxxx"
    assert {found.chosen(dtype, rows) for dtype in gemm.DTYPES for rows in ROWS} == {ROCBLAS}


def test_chatter_is_no_answer(tmp_path: Path) -> None:
    found = tried(
        tmp_path, "print('rocBLAS warning', flush=True)", before="print('ready')\nprint('hello', file=sys.stderr)"
    )
    assert not found.bad


def test_a_probe_that_does_not_start_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"^SystemExit: no GPU left$|^no GPU left$"):
        tried(tmp_path, "", before="raise SystemExit('no GPU left')")
    with assume(named("gfx1151")):
        assert gemm.verdicts(CPU).found == ()
    with assume(named("gfx1151")), pytest.raises(ProbeError, match="ModuleNotFoundError"):
        probe(CPU, command=[sys.executable, "-c", "import nothing_of_this_name"])


def test_verdicts_are_kept_for_other_processes(tmp_path: Path) -> None:
    found = tried(tmp_path, "if library == 'hipBLASLt' and len(x) == 1: os.abort()")
    with assume(named("gfx1151")):
        assert gemm.verdicts(CPU) == found
    program = """
import torch
from gfxlm.device import gemm
print([v.outcome for v in gemm.verdicts(torch.device("cpu")).found].count("crashed"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"GFXLM_ASSUME_ARCH": "gfx1151", "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "3"
    with assume(named("gfx1201")):
        assert gemm.verdicts(CPU).found == ()
    assert [path.name for path in found.path.parent.iterdir()] == [found.path.name]  # no scratch files


def test_verdicts_hold_where_they_cannot_be_kept(tmp_path: Path) -> None:
    """A home that cannot be written to must not bring back a library that was just found to be wrong."""
    (tmp_path / "cache").write_text("no folder")
    with pytest.warns(UserWarning, match=r"is not kept, every start tries again: .*cache"):
        found = tried(tmp_path, "if library == 'hipBLASLt' and len(x) == 1: out[0, 0] = 9")
    with assume(named("gfx1151")):
        assert gemm.verdicts(CPU) == found
    assert found.chosen(torch.bfloat16, 1) == ROCBLAS


def test_what_is_tried_is_said_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried(tmp_path, "pass")
    out, err = capsys.readouterr()
    told = "once for this GPU, driver and torch: about half a minute"
    assert out == ""
    assert err.splitlines() == [f"gfxlm: trying hipBLASLt (1 of 2), {told}", f"gfxlm: trying rocBLAS (2 of 2), {told}"]


ENTRY = {"library": HIPBLASLT, "dtype": "bfloat16", "rows": 32, "outcome": "wrong", "detail": ""}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"verdicts": 3}',
        '{"verdicts": [3]}',
        json.dumps({"verdicts": [ENTRY | {"more": 1}]}),
        json.dumps({"verdicts": [ENTRY | {"rows": "32"}]}),
        json.dumps({"verdicts": [{k: v for k, v in ENTRY.items() if k != "dtype"}]}),
        "\ud800",
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning(text: str) -> None:
    with assume(named("gfx942")):
        path = gemm.untried(CPU).path
        path.parent.mkdir(parents=True)
        path.write_bytes(text.encode(errors="surrogatepass"))
        gemm.forget()
        with pytest.warns(UserWarning, match=r"gfx942-.*\.json is damaged and is not used"):
            found = gemm.verdicts(CPU)
        assert found.found == ()
        assert found.chosen(torch.bfloat16, 1) == HIPBLASLT
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gemm.verdicts(CPU)  # once is enough


def test_order_on_every_part() -> None:
    for name, arch in ARCHITECTURES.items():
        last = (TRITON,) if arch.kernels else ()
        assert gemm.order(arch) == ((HIPBLASLT, ROCBLAS) if name.startswith("gfx") else (CUBLAS, CUBLASLT)) + last
        with assume(arch):
            assert gemm.library(CPU, torch.bfloat16, 7) == gemm.order(arch)[0]
    assert gemm.library(CPU, torch.bfloat16, 7) == "oneDNN"
    assert gemm_probe.ensure(CPU).found == ()


def test_row_classes() -> None:
    assert [gemm.row_class(n) for n in (0, 1, 2, 32, 33, 512, 513, 2048, 2049, 10**6)] == [
        1,
        1,
        32,
        32,
        512,
        512,
        2048,
        2048,
        2048,
        2048,
    ]


def test_nothing_is_read_again_on_the_hot_path(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm.prefer(CPU, torch.bfloat16, 5)

    def unread(_: object) -> None:
        raise AssertionError("looked up twice")

    monkeypatch.setattr(gemm, "_read", unread)
    monkeypatch.setattr(gemm, "untried", unread)
    assert gemm.prefer(CPU, torch.bfloat16, 6) == "oneDNN"


def test_verdict_files_survive_two_writers(tmp_path: Path) -> None:
    program = """
import torch, dataclasses, sys
from gfxlm.device import gemm
empty = gemm.untried(torch.device("cpu"))
for count in range(200):
    found = tuple(gemm.Verdict("rocBLAS", "float16", 32, "right", sys.argv[1] * 500) for _ in range(count % 20))
    dataclasses.replace(empty, found=found).save()
    gemm.verdicts(torch.device("cpu"))
"""
    words = [sys.executable, "-W", "error", "-c", program]
    root = Path(__file__).parents[2]
    writers = [subprocess.Popen([*words, name], cwd=root) for name in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_libraries_of_this_gpu() -> None:
    found = probe(torch.device("cuda", 0))
    assert found.found
    assert not found.bad
    assert gemm.prefer(torch.device("cuda", 0), torch.bfloat16, 100) == found.order[0]
    assert isinstance(found.found[0], Verdict)
