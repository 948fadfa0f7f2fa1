"""Python processes in which Triton compiles: in this one, where there is no GPU, it interprets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def run_python(code: str, *arguments: str, root: Path = ROOT, timeout: int = 280, **variables: str) -> Any:
    """What the code prints, as JSON. The shipped tables are in force, and `root` is where gfxlm is imported from."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"GFXLM_CONFIGS": "", "PYTHONPATH": f"{root}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, cwd=root)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
