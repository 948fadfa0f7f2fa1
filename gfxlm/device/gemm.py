"""Which BLAS library answers for matrix products of which type and number of rows.

Libraries are tried by `gemm_probe` in a process of their own, because a wrong one may crash or hang. What was found is
kept in the user's cache, by architecture, driver and version of torch. What nobody tried is taken to be right.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from gfxlm.device.arch import Architecture, architecture
from gfxlm.device.files import cache_folder, write_whole

HIPBLASLT, ROCBLAS, CUBLASLT, CUBLAS, TRITON, ONEDNN = "hipBLASLt", "rocBLAS", "cuBLASLt", "cuBLAS", "Triton", "oneDNN"
# Torch's names, which are NVIDIA's on AMD too.
TORCH_NAMES = {HIPBLASLT: "cublaslt", ROCBLAS: "cublas", CUBLASLT: "cublaslt", CUBLAS: "cublas"}
RIGHT = "right"
ROWS = (1, 32, 512, 2048)  # a class is up to so many, the last one more, too
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a library's products of a type ("bfloat16") and up to so many rows."""

    library: str
    dtype: str
    rows: int
    outcome: str  # right, wrong, not finite, refused, absent, crashed, hung
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """All that is known of a machine's libraries; nothing, if they were never tried."""

    arch: str
    driver: str
    version: str  # torch's
    order: tuple[str, ...]  # of preference
    found: tuple[Verdict, ...] = field(default=())

    def chosen(self, dtype: torch.dtype, rows: int) -> str:
        """The library for products of so many rows: the first that is not known to be bad, else the last resort."""
        name, limit = _named(dtype), row_class(rows)
        bad = {v.library for v in self.found if (v.dtype, v.rows) == (name, limit) and v.outcome != RIGHT}
        return next((library for library in self.order if library not in bad), self.order[-1])

    @property
    def bad(self) -> list[Verdict]:
        """Those that are not right, of libraries that should be there."""
        return [verdict for verdict in self.found if verdict.outcome not in (RIGHT, "absent")]

    @property
    def path(self) -> Path:
        """The file they are kept in."""
        name = re.sub(r"[^\w.+-]+", "_", f"{self.arch}-{self.driver}-{self.version}")
        return cache_folder() / "blas" / f"{name}.json"

    def save(self) -> Path:
        """Use them from now on, and write them, whole or not at all, for every other process. OSError if it cannot."""
        _chosen.cache_clear()
        _known[replace(self, found=())] = self
        write_whole(self.path, json.dumps({"verdicts": [asdict(verdict) for verdict in self.found]}, indent=1) + "\n")
        return self.path


def order(arch: Architecture) -> tuple[str, ...]:
    """The libraries there are on an architecture, the best one first, and the one that always works last."""
    last = (TRITON,) if arch.kernels else ()
    match arch.vendor:
        case "amd":
            return (HIPBLASLT, ROCBLAS, *last)
        case "nvidia":
            return (CUBLAS, CUBLASLT, *last)  # what torch takes by itself, and the tables were measured with
    return (ONEDNN,)


def row_class(rows: int) -> int:
    """The class of ROWS that so many rows belong to."""
    return next((limit for limit in ROWS if rows <= limit), ROWS[-1])


def untried(device: torch.device) -> Verdicts:
    """Verdicts of nothing for the device, or for the architecture that is assumed."""
    arch = architecture(device)
    return Verdicts(arch.name, _driver(), torch.__version__, order(arch))


def verdicts(device: torch.device) -> Verdicts:
    """What is known of the device's libraries. Tries none of them; a file that is damaged is warned of."""
    empty = untried(device)
    if empty not in _known:
        _known[empty] = _read(empty)
    return _known[empty]


def library(device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """Who is to multiply x (rows, K) of this type with a matrix. As cheap as a look-up."""
    return _chosen(device, architecture(device), dtype, row_class(rows))


def prefer(device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """`library`, with torch's own products going there from now on."""
    global _preferred
    chosen = library(device, dtype, rows)
    if chosen != _preferred and device.type == "cuda" and chosen in TORCH_NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the choice is experimental
            torch.backends.cuda.preferred_blas_library(TORCH_NAMES[chosen])
        _preferred = chosen
    return chosen


_preferred: str | None = None
_known: dict[Verdicts, Verdicts] = {}  # by the same of which nothing is known


def forget() -> None:
    """Read the verdicts anew when they are next asked for."""
    _known.clear()
    _chosen.cache_clear()


@functools.lru_cache(maxsize=256)
def _chosen(device: torch.device, arch: Architecture, dtype: torch.dtype, rows: int) -> str:
    # What is recorded without a GPU is for any machine of the architecture.
    known = verdicts(device) if device.type == "cuda" else untried(device)
    return known.chosen(dtype, rows)


def _read(empty: Verdicts) -> Verdicts:
    path = empty.path
    try:
        found = tuple(_checked(entry) for entry in json.loads(path.read_text())["verdicts"])
    except FileNotFoundError:
        found = ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is damaged and is not used ({type(error).__name__}: {error})", stacklevel=3)
        found = ()
    return Verdicts(empty.arch, empty.driver, empty.version, empty.order, found)


def _checked(entry: dict[str, object]) -> Verdict:
    verdict = Verdict(**entry)  # type: ignore[arg-type]
    if not all(isinstance(getattr(verdict, name), kind) for name, kind in Verdict.__annotations__.items()):
        raise TypeError(f"no verdict: {entry}")
    return verdict


def joined(answers: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """One outcome and detail for several products of a class: the first that is not right."""
    known = list(answers)
    return next((answer for answer in known if answer[0] != RIGHT), known[0])


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache
def _driver() -> str:
    """The version of what torch runs on: ROCm or CUDA, and the kernel's part of it."""
    if torch.version.hip:
        module = Path("/sys/module/amdgpu/version")
        return f"{torch.version.hip}-{module.read_text().strip() if module.is_file() else os.uname().release}"
    module = Path("/sys/module/nvidia/version")
    return f"{torch.version.cuda}-{module.read_text().strip() if module.is_file() else 'unknown'}"
