"""Products with unquantised matrices, for machines where no BLAS library answers."""

from functools import partial

import torch

from gfxlm.kernels.case import Call, Case
from gfxlm.kernels.linear.dense import dense

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Qwen3-8B: qkv and down; Qwen3-Coder-Next: an expert's down and the router.
SHAPES = [(6144, 4096), (4096, 12288), (2048, 512), (512, 2048)]


def cases() -> list[Case]:
    """Few rows and many in every type, and odd sizes."""
    found = [_dense(m, n, k, BF16, headline=(n, m) == (6144, 2048)) for n, k in SHAPES for m in (1, 32, 512, 2048)]
    found += [_dense(m, 6144, 4096, dtype) for dtype in (FP16, FP32) for m in (1, 100, 512)]
    return found + [_dense(m, 200, 330, dtype, bias=True) for dtype in (BF16, FP16, FP32) for m in (7, 77)]


def _dense(m: int, n: int, k: int, dtype: torch.dtype, *, bias: bool = False, headline: bool = False) -> Case:
    name = f"dense/{n}x{k}/{str(dtype).removeprefix('torch.')}/m{m}"
    nbytes = (n * k + m * (n + k)) * dtype.itemsize
    return Case(name, partial(_call, m, n, k, dtype, bias), nbytes, 2 * m * n * k, headline)


def _call(m: int, n: int, k: int, dtype: torch.dtype, bias: bool, device: torch.device) -> Call:
    x, w = (torch.randn(rows, k, dtype=dtype, device=device) for rows in (m, n))
    added = torch.randn(n, dtype=dtype, device=device) if bias else None
    return lambda: dense(x, w, bias=added)
