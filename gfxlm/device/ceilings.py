"""What this machine can do at best, measured: the figures that speeds are shares of."""

import time
from collections.abc import Callable

import torch

from gfxlm.device.memory import available_bytes

# More than any cache holds.
_READ_BYTES = {"cpu": 1 << 30, "cuda": 1 << 31}
# Large enough that the rate no longer grows, small enough to take a moment.
_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}


def backend_name(device: torch.device) -> str:
    """CPU, CUDA or ROCm."""
    return "CPU" if device.type == "cpu" else "ROCm" if torch.version.hip else "CUDA"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a reduction over memory reads."""
    nbytes = min(_READ_BYTES[device.type], available_bytes(device) // 4)
    x = torch.ones(nbytes // 4, device=device)
    return x.nbytes / _best_seconds(x.amax, device)


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large square bfloat16 matrix product."""
    n = _MATRIX_SIZE[device.type]
    # Random numbers: constants need less power, and a GPU then runs faster than it ever does in earnest.
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3 / _best_seconds(lambda: a @ b, device)


def _best_seconds(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
