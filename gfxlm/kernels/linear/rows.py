"""Rows of a quantised matrix by index: an embedding look-up."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.linear.codes import code_value, load_codes, load_scales, scale_arguments
from gfxlm.kernels.packed import Packed
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config


@triton.jit
def rows_kernel(
    p_indices,  # (count,)
    p_words,  # int32 (N, K * bits / 32)
    p_scales,  # (N, K / group_size): `Packed.pairs`, or its scales
    p_biases,
    p_y,  # (count, K)
    N,
    stride_row,  # of the scales
    stride_group,
    K: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    mode: tl.constexpr,
    layout: tl.constexpr,
    early: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K columns of one row."""
    before_the_next(early)
    after_the_last(early)
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    i_y = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.minimum(tl.maximum(tl.load(p_indices + i_y).to(tl.int64), 0), N - 1)
    o_k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    codes = load_codes(p_words, row * (K // 32 * bits), o_k, m_k, bits)
    o_group = row * stride_row + o_k // group_size * stride_group
    scales, biases = load_scales(p_scales, p_biases, o_group, m_k, layout)
    y = code_value(codes, mode) * scales + biases
    tl.store(p_y + i_y * K + o_k, y.to(p_y.dtype.element_ty), mask=m_k)


def rows(indices: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """Dequantised rows (count, K), rounded once to dtype, for integer indices (count,)."""
    columns = packed.columns
    y = torch.empty((indices.shape[0], columns), dtype=dtype, device=indices.device)
    if y.numel() == 0:
        return y
    chosen = config("rows", indices.device)
    block_k = min(next_power_of_2(columns), chosen["block_k"])
    scales, biases, layout = scale_arguments(packed)
    launch(
        rows_kernel,
        (indices.shape[0] * cdiv(columns, block_k),),
        indices.contiguous(),
        packed.words.contiguous(),
        scales,
        biases,
        y,
        packed.rows,
        scales.stride(-2),
        scales.stride(-1),
        options={"num_warps": chosen["num_warps"]},
        K=columns,
        bits=packed.bits,
        group_size=packed.group_size,
        mode=packed.mode,
        layout=layout,
        BLOCK_K=block_k,
    )
    return y
