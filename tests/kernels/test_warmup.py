"""A warm cache: what was compiled ahead of time is what runs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gfxlm.kernels.cases import catalogue
from tests.kernels.compiled import ROOT, run_python

RUN = """
import json, torch
from triton import knobs
from gfxlm.kernels.cases import catalogue

device = torch.device("cuda", 0)
missed, hits = [], 0

def listener(src, metadata, metadata_group, times, cache_hit):
    global hits
    hits += cache_hit
    if not cache_hit:
        missed.append(f"{case.name}: {src.name}")

knobs.compilation.listener = listener
with torch.inference_mode():
    for cases in catalogue().values():
        for case in cases:
            if case.headline:
                case.make(device)()
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
print(json.dumps([hits, missed]))
"""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_warm_cache_compiles_nothing(tmp_path: Path) -> None:
    names = [case.name for cases in catalogue().values() for case in cases if case.headline]
    command = [sys.executable, "-m", "gfxlm", "warmup", *(word for name in names for word in ("--op", name))]
    environment: dict[str, Any] = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "GFXLM_CONFIGS": ""}
    subprocess.run(command, env=environment, check=True, timeout=600, cwd=ROOT)
    hits, missed = run_python(RUN, TRITON_CACHE_DIR=str(tmp_path), timeout=600)
    assert missed == []
    assert hits > 0
