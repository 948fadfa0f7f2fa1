"""PyTorch's TunableOp: the fastest of AMD's matrix kernels for each size of product, measured once and kept.

torch writes its file when the process ends, and not if that is killed. Here results are written at once, as a whole.
"""

import csv
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.cuda.tunable as tunable

from gfxlm.device import gemm
from gfxlm.device.files import write_whole
from gfxlm.device.gemm import HIPBLASLT, ROCBLAS

# Of the default's numbers, which a candidate must agree with: some roundings of bfloat16 in sums of thousands.
_ATOL, _RTOL = 0.1, 0.05
_SWITCHES = {HIPBLASLT: "PYTORCH_TUNABLEOP_HIPBLASLT_ENABLED", ROCBLAS: "PYTORCH_TUNABLEOP_ROCBLAS_ENABLED"}


def results_path(device: torch.device) -> Path:
    """The file of what was measured on this machine."""
    return gemm.untried(device).path.with_suffix(".csv")


def record(device: torch.device, work: Callable[[], object]) -> Path:
    """Measure every product that `work` does and that is not known yet, and keep the fastest."""
    bad = {verdict.library for verdict in gemm.verdicts(device).bad} & _SWITCHES.keys()
    for library in bad:
        os.environ[_SWITCHES[library]] = "0"  # it is fast, perhaps, but wrong
    if not bad:  # what is known might have been measured before that was
        load(device)
    _enable(device)
    tunable.tuning_enable(True)
    tunable.set_numerical_check_tolerances(True, _ATOL, _RTOL)
    try:
        work()
        torch.cuda.synchronize(device)
    finally:
        tunable.tuning_enable(False)
    return _write(results_path(device))


def load(device: torch.device) -> bool:
    """Use what was recorded on this machine, if anything was. torch itself refuses another version's results."""
    path = results_path(device)
    if not path.is_file():
        return False
    _enable(device)
    if not tunable.read_file(str(path)):
        tunable.enable(False)
        warnings.warn(f"{path} is not used: it is damaged, or another version's; gfxlm tune --blas", stacklevel=2)
        return False
    return True


def _enable(device: torch.device) -> None:
    # torch reads and writes a file of its own, in the current folder where it is not told another one.
    tunable.set_filename(str(results_path(device).with_suffix(".torch.csv")))
    tunable.enable(True)
    tunable.tuning_enable(False)


def _write(path: Path) -> Path:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerows(("Validator", *validator) for validator in tunable.get_validators())
    rows.writerows(tunable.get_results())  # type: ignore[arg-type]  # a list of them, whatever torch's hints say
    write_whole(path, text.getvalue())
    return path
