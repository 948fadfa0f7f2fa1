"""Whether the kernels give the right numbers here: the kernel tests of what is about to be measured.

python -m benchmarks.verify [--op matvec]
"""

import argparse
import subprocess
import sys
from pathlib import Path

from gfxlm.errors import UserError
from gfxlm.kernels.cases import catalogue

_TESTS = Path(__file__).parent.parent / "tests" / "kernels"
# Which tests stand for a topic of cases.
_OF_TOPIC = {
    "matvec": ["linear"],
    "wide": ["linear"],
    "moe_decode": ["moe"],
    "moe_prefill": ["moe"],
    "attention": ["attention"],
    "delta": ["delta"],
    "basic": ["basic"],
}


def verify(ops: list[str] | None = None) -> bool:
    """Run the tests of every topic that the operations belong to; whether all of them pass."""
    folders = sorted({folder for topic in catalogue(ops) for folder in _OF_TOPIC[topic]})
    command = [sys.executable, "-m", "pytest", "-q", *(str(_TESTS / folder) for folder in folders)]
    return subprocess.run(command, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="a topic, an operation or the beginning of a case's name")
    try:
        return 0 if verify(parser.parse_args().op) else 1
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
