"""Softmax over the last axis and the gated activation, in fp32 and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.basic.rows import row_offset, rows
from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config


@triton.jit(do_not_specialize=["n_rows"])
def softmax_kernel(
    p_x,  # (n_rows, D)
    p_y,  # (n_rows, D), contiguous
    n_rows,
    x_inner,
    x_outer,
    x_step,
    D,
    early: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # a row fits into BLOCK
):
    """ROWS rows. A row that does not fit into BLOCK is read three times: for its maximum, its sum, and its result."""
    before_the_next(early)
    after_the_last(early)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = (o_row < n_rows)[:, None]
    p_x += row_offset(o_row, x_inner, x_outer, x_step)[:, None]
    p_y += o_row[:, None] * D
    o_block = tl.arange(0, BLOCK)[None, :]
    minus_inf: tl.constexpr = float("-inf")
    if WHOLE:
        mask = m_row & (o_block < D)
        b_x = tl.load(p_x + o_block, mask=mask, other=minus_inf).to(tl.float32)
        b_x = tl.exp(b_x - tl.max(b_x, 1)[:, None])
        tl.store(p_y + o_block, (b_x / tl.sum(b_x, 1)[:, None]).to(p_y.dtype.element_ty), mask=mask)
    else:
        b_max = tl.full([ROWS, BLOCK], minus_inf, tl.float32)
        for start in range(0, D, BLOCK):
            mask = m_row & (start + o_block < D)
            b_max = tl.maximum(b_max, tl.load(p_x + start + o_block, mask=mask, other=minus_inf).to(tl.float32))
        top = tl.max(b_max, 1)[:, None]  # (ROWS, 1)
        b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            mask = m_row & (start + o_block < D)
            b_sum += tl.exp(tl.load(p_x + start + o_block, mask=mask, other=minus_inf).to(tl.float32) - top)
        total = tl.sum(b_sum, 1)[:, None]
        for start in range(0, D, BLOCK):
            mask = m_row & (start + o_block < D)
            b_x = tl.exp(tl.load(p_x + start + o_block, mask=mask, other=minus_inf).to(tl.float32) - top)
            tl.store(p_y + start + o_block, (b_x / total).to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def swiglu_kernel(
    p_gate,  # (n_rows, D)
    p_x,  # (n_rows, D)
    p_y,  # (n_rows, D), contiguous
    n_rows,
    gate_inner,
    gate_outer,
    gate_step,
    x_inner,
    x_outer,
    x_step,
    D,
    n_blocks,
    early: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows and BLOCK columns of silu(gate) * x."""
    before_the_next(early)
    after_the_last(early)
    o_row = (tl.program_id(0) // n_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (o_row < n_rows)[:, None] & (o_d < D)
    o_gate = row_offset(o_row, gate_inner, gate_outer, gate_step)[:, None] + o_d
    o_x = row_offset(o_row, x_inner, x_outer, x_step)[:, None] + o_d
    b_gate = tl.load(p_gate + o_gate, mask=mask, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
    b_y = b_gate / (1.0 + tl.exp(-b_gate)) * b_x
    tl.store(p_y + o_row[:, None] * D + o_d, b_y.to(p_y.dtype.element_ty), mask=mask)


def softmax(x: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(x) / sum(exp(x)) over the last axis of x (..., D), as dtype."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    columns = x.shape[-1]
    n_rows = x.numel() // columns
    tuned = config("softmax", x.device, columns=columns, rows=n_rows)
    block = min(next_power_of_2(columns), tuned["BLOCK"])
    at = rows(x)
    launch(
        softmax_kernel,
        (cdiv(n_rows, tuned["ROWS"]),),
        at.tensor,
        y,
        n_rows,
        *at[1:],
        columns,
        options={"num_warps": tuned["num_warps"]},
        ROWS=tuned["ROWS"],
        BLOCK=block,
        WHOLE=columns <= block,
    )
    return y


def swiglu(gate: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(gate) * x for gate and x (..., D), as dtype."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    columns = x.shape[-1]
    n_rows = x.numel() // columns
    tuned = config("swiglu", x.device, columns=columns, rows=n_rows)
    block = min(next_power_of_2(columns), tuned["BLOCK"])
    n_blocks = cdiv(columns, block)
    at_gate, at_x = rows(gate), rows(x)
    launch(
        swiglu_kernel,
        (n_blocks * cdiv(n_rows, tuned["ROWS"]),),
        at_gate.tensor,
        at_x.tensor,
        y,
        n_rows,
        *at_gate[1:],
        *at_x[1:],
        columns,
        n_blocks,
        options={"num_warps": tuned["num_warps"]},
        ROWS=tuned["ROWS"],
        BLOCK=block,
    )
    return y
