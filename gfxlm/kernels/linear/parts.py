"""The sum of what programs that share K have each made of a product, in an order that is always the same."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv


@triton.jit(do_not_specialize=["stride_part"])
def add_parts_kernel(
    p_parts,  # fp32 (SPLITS, M, N)
    p_bias,  # (N,) or None
    p_residual,  # (M, N) or None
    p_y,  # (M, N)
    N,
    stride_part,
    stride_residual,
    SPLITS: tl.constexpr,
    early: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row."""
    before_the_next(early)
    after_the_last(early)
    row = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < N
    y = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(SPLITS):
        y += tl.load(p_parts + row * N + o_n, mask=mask, other=0.0)
        p_parts += stride_part
    if p_bias is not None:
        y += tl.load(p_bias + o_n, mask=mask, other=0.0).to(tl.float32)
    if p_residual is not None:
        y += tl.load(p_residual + row * stride_residual + o_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_y + row * N + o_n, y.to(p_y.dtype.element_ty), mask=mask)


def add_parts(
    parts: Tensor, dtype: torch.dtype, *, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Fp32 parts (S, M, N), bias (N,) and residual (M, N), of any row stride, added and rounded once: (M, N)."""
    splits, rows, n = parts.shape
    y = torch.empty((rows, n), dtype=dtype, device=parts.device)
    block = 512
    launch(
        add_parts_kernel,
        (rows, cdiv(n, block)),
        parts,
        bias,
        residual,
        y,
        n,
        parts.stride(0),
        0 if residual is None else residual.stride(0),
        SPLITS=splits,
        BLOCK=block,
        options={"num_warps": 4},
    )
    return y
