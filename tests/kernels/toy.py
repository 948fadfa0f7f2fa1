"""A small kernel with a loop, and a case of it."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.case import Case
from gfxlm.kernels.launch import launch

FACTOR = tl.constexpr(2)


@triton.jit
def twice(x):
    """Two times x."""
    return x * FACTOR


@triton.jit
def total_kernel(p_x, p_y, rows, columns, stride, BLOCK: tl.constexpr):
    """Twice the sum of a row."""
    o = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        acc += twice(tl.load(p_x + tl.program_id(0) * stride + start + o, mask=start + o < columns, other=0.0))
    tl.store(p_y + tl.program_id(0), tl.sum(acc, 0))


def totals(x: Tensor, num_warps: int = 1) -> Tensor:
    """Twice the sum of each row of x (M, N) in fp32."""
    y = torch.empty(x.shape[0], device=x.device)
    launch(total_kernel, x.shape[:1], x, y, *x.shape, x.stride(0), BLOCK=128, options={"num_warps": num_warps})
    return y


def make(device: torch.device) -> Callable[[], Tensor]:
    x = torch.zeros(4, 1000, device=device)
    return lambda: totals(x)


TOY = Case("toy/4x1000", make, nbytes=16000, flops=8000)
