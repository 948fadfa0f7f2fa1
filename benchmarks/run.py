"""Speed of the kernels on the GPU that is here, as shares of what it was measured to do in the same run.

    python -m benchmarks.run [--op matvec] [--json results.json]

Times are of graph replays with inputs rotated past the cache, medians, in µs. --json first runs the kernels' tests,
and writes nothing if one fails.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import triton

from benchmarks.registry import Ceilings, Measured, measure
from benchmarks.verify import verify
from gfxlm.device.arch import architecture
from gfxlm.errors import UserError
from gfxlm.kernels.case import Case
from gfxlm.kernels.cases import catalogue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="a topic, an operation or the beginning of a case's name")
    parser.add_argument("--headline", action="store_true", help="the headline cases alone")
    parser.add_argument("--json", type=Path, help="write the results here, if the kernels' tests pass")
    args = parser.parse_args()
    try:
        chosen = catalogue(args.op)
    except UserError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here, and nothing to measure")
    if args.json and not verify(args.op):
        sys.exit("the kernels' tests fail: no speed is recorded")
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = Ceilings.measure(device)
    name = torch.cuda.get_device_name(device)
    print(f"{name}: reads {ceilings.read_bandwidth / 1e12:.2f} TB/s, bf16 {ceilings.matmul_rate / 1e12:.0f} TFLOP/s")
    print(f"{'case':<58} {'µs':>9} {'TB/s':>7} {'TFLOP/s':>8} {'share':>6}  bar")
    results = []
    for cases in chosen.values():
        for case in cases:
            if case.headline or not args.headline:
                results += _measured(case, device, ceilings)
                torch.cuda.empty_cache()
    if args.json:
        about = {"device": name, "arch": architecture(device).name, "torch": torch.__version__}
        about |= {"triton": triton.__version__, "read_bandwidth": ceilings.read_bandwidth}
        about |= {"matmul_rate": ceilings.matmul_rate, "results": [result.row() for result in results]}
        args.json.write_text(json.dumps(about, indent=1) + "\n")
    return 1 if any(result.passes is False for result in results) else 0


def _measured(case: Case, device: torch.device, ceilings: Ceilings) -> list[Measured]:
    """The case's result, printed; nothing where it cannot be measured, which is printed, too."""
    try:
        result = measure(case, device, ceilings)
    except Exception as error:
        torch.cuda.synchronize()
        print(f"{case.name:<58} {type(error).__name__}: {' '.join(str(error).split())[:120]}")
        return []
    tb_s = f"{result.tb_s:7.2f}" if result.nbytes else " " * 7
    tflops = f"{result.tflops:8.1f}" if result.flops else " " * 8
    verdict = f"{result.bar}: {'reached' if result.passes else 'missed'}" if result.bar else ""
    print(f"{case.name:<58} {result.us:9.2f} {tb_s} {tflops} {result.share:6.1%}  {verdict}", flush=True)
    return [result]


if __name__ == "__main__":
    sys.exit(main())
