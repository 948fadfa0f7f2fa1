"""Compile every kernel for every AMD target and write down what came out: `make codegen`.

What the manifest has already is skipped, so a run that was interrupted continues. Exit code 1 if something fails.
"""

import argparse
import os
import sys

os.environ["GFXLM_CONFIGS"] = ""  # the shipped tables, not this machine's

from gfxlm.cli.progress import progress_bar
from gfxlm.kernels.check import update
from gfxlm.kernels.manifest import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--op", action="append", help="a topic, an operation or the beginning of a case's name")
    parser.add_argument("--jobs", type=int, help="processes; default: one a core")
    args = parser.parse_args()
    with progress_bar("compiling") as progress:
        complaints = update(tuple(args.arch or TARGETS), args.op, args.jobs, progress)
    for line in complaints:
        print(line)
    print(f"{len(complaints)} failures", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
