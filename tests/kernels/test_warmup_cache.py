"""The cache of compiled kernels: two processes that fill it at once, and one that is killed while it does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kernels.compiled import ROOT, run_python

pytestmark = pytest.mark.slow
OPS = ("rms_norm", "softmax", "swiglu")


def warmup(cache: Path) -> subprocess.Popen[str]:
    """`gfxlm warmup` in a group of processes of its own."""
    command = [sys.executable, "-m", "gfxlm", "warmup", "--arch", "gfx1151", "--jobs", "1"]
    command += [word for op in OPS for word in ("--op", op)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "GFXLM_CONFIGS": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def compiled(process: subprocess.Popen[str]) -> int:
    """How many kernels a warm-up that went well has compiled."""
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    found = re.fullmatch(r"gfx1151: (\d+) kernels compiled for \d+ cases, 0 cases failed\n", out)
    assert found, out
    return int(found[1])


def code(cache: Path) -> dict[str, bytes]:
    """Machine code by its place in the cache."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*.hsaco")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one undisturbed process leaves."""
    cache = tmp_path_factory.mktemp("whole")
    assert compiled(warmup(cache)) == len(code(cache)) > 3
    return cache


def check(cache: Path, whole: Path) -> None:
    """All is there, is as it should be, and is found again."""
    assert code(cache) == code(whole)
    for path in cache.rglob("*.json"):
        json.loads(path.read_text())
    assert compiled(warmup(cache)) == 0


def test_two_at_once(whole: Path, tmp_path: Path) -> None:
    both = [warmup(tmp_path) for _ in range(2)]
    counts = [compiled(process) for process in both]
    assert sum(counts) >= len(code(whole))  # what both compiled at the same time counts twice
    check(tmp_path, whole)


def test_killed_half_way(whole: Path, tmp_path: Path) -> None:
    process, end = warmup(tmp_path), time.monotonic() + 100
    while len(code(tmp_path)) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    left = code(tmp_path)
    assert 2 <= len(left) < len(code(whole))
    rest = compiled(warmup(tmp_path))
    # The last one may have been written, but not yet the file by which it is found.
    assert len(code(whole)) - len(left) <= rest <= len(code(whole)) - len(left) + 1
    check(tmp_path, whole)


OWN = """
import triton
import triton.language as tl

@triton.jit
def kernel(p_x):
    tl.store(p_x, tl.load(p_x) + {added})
"""
COMPILE = """
import json, sys
import torch
from triton import knobs
import own
from gfxlm.device.arch import named
from gfxlm.kernels.launch import launch, recording

hits = []
knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
arch = named(sys.argv[1])
with recording(arch) as launches:
    launch(own.kernel, (1,), torch.empty(4, device="meta"))
launches[0].compile(arch)
print(json.dumps(hits))
"""


def test_architecture_and_source_are_the_key(tmp_path: Path) -> None:
    def hit(arch: str, added: int) -> bool:
        (tmp_path / "own.py").write_text(OWN.format(added=added))
        [found] = run_python(COMPILE, arch, root=tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
        return bool(found)

    assert [hit("gfx1151", 1), hit("gfx1151", 1), hit("gfx1201", 1), hit("gfx1151", 20)] == [False, True, False, False]
    assert [hit("gfx1151", 1), hit("gfx1201", 1), hit("gfx1151", 20)] == [True, True, True]
