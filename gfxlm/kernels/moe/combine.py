"""The end of a mixture of experts: the weighted sum of each token's rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.layout import adjacent
from gfxlm.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def combine_kernel(
    p_routed,  # (T, TOP, D)
    p_scores,  # fp32 (T, TOP)
    p_shared,  # (T, D) or None
    p_residual,  # (T, D) or None
    p_y,  # (T, D)
    stride_shared,
    stride_residual,
    D,
    TOP: tl.constexpr,
    early: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token's sum over its experts, in their order, then what is added to it."""
    before_the_next(early)
    after_the_last(early)
    token = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_d < D
    acc = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP):
        score = tl.load(p_scores + token * TOP + i)
        acc += score * tl.load(p_routed + (token * TOP + i) * D + o_d, mask=mask, other=0).to(tl.float32)
    if p_shared is not None:
        acc += tl.load(p_shared + token * stride_shared + o_d, mask=mask, other=0).to(tl.float32)
    if p_residual is not None:
        acc += tl.load(p_residual + token * stride_residual + o_d, mask=mask, other=0).to(tl.float32)
    tl.store(p_y + token * D + o_d, acc.to(p_y.dtype.element_ty), mask=mask)


def combine(routed: Tensor, scores: Tensor, shared: Tensor | None, residual: Tensor | None) -> Tensor:
    """`sum_k scores_k * routed_k + shared + residual` in fp32, in the order of k.

    routed (T, k, D), contiguous, scores (T, k), shared and residual (T, D). Returns (T, D) in routed's dtype.
    """
    tokens, k, columns = routed.shape
    y = torch.empty((tokens, columns), dtype=routed.dtype, device=routed.device)
    shared, residual = (t if t is None else adjacent(t) for t in (shared, residual))
    block = min(1024, next_power_of_2(columns))
    launch(
        combine_kernel,
        (tokens, cdiv(columns, block)),
        routed,
        scores.contiguous(),
        shared,
        residual,
        y,
        0 if shared is None else shared.stride(0),
        0 if residual is None else residual.stride(0),
        columns,
        TOP=k,
        BLOCK=block,
        options={"num_warps": 4},
    )
    return y
