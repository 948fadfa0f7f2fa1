"""Norms over the last axis: statistics in fp32, IEEE 1 / sqrt, rounded to the result's type before the weight."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.basic.rows import row_offset, rows
from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _values(p_x, p_residual, o_d, mask, rounded: tl.constexpr):
    """x, or x + residual as the type that the sum has, in fp32."""
    b_x = tl.load(p_x + o_d, mask=mask, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_x += tl.load(p_residual + o_d, mask=mask, other=0.0).to(tl.float32)
        b_x = b_x.to(rounded).to(tl.float32)
    return b_x


@triton.jit
def _inverse_root(square, count: tl.constexpr, eps: tl.constexpr):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, tl.full([], count, tl.float32)) + eps))


@triton.jit
def _write(b_x, scale, b_weight, p_gate, p_y, o_d, mask, rounded: tl.constexpr):
    b_y = (b_x * scale[:, None]).to(rounded).to(tl.float32)
    if b_weight is not None:
        b_y = (b_y * b_weight.to(tl.float32)).to(rounded).to(tl.float32)
    if p_gate is not None:
        b_gate = tl.load(p_gate + o_d, mask=mask, other=0.0).to(tl.float32)
        b_y *= b_gate / (1.0 + tl.exp(-b_gate))
    tl.store(p_y + o_d, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_kernel(
    p_x,  # (n_rows, D)
    p_residual,  # (n_rows, D) or None: x + residual is what is normed
    p_gate,  # (n_rows, D) or None: the result is multiplied with its SiLU
    p_weight,  # (D,) or None
    p_y,  # (n_rows, D), contiguous
    p_sum,  # (n_rows, D), contiguous, or None: x + residual
    n_rows,
    x_inner,
    x_outer,
    x_step,
    residual_inner,
    residual_outer,
    residual_step,
    gate_inner,
    gate_outer,
    gate_step,
    D: tl.constexpr,
    count: tl.constexpr,  # what the sum of squares is divided by: D, or 1 for the l2 norm
    eps: tl.constexpr,
    rounded: tl.constexpr,  # the type of the sum, and of the norm before and after its weight
    early: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows, BLOCK columns at a time; of a row that fits into BLOCK every number is read once."""
    before_the_next(early)
    after_the_last(early)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = (o_row < n_rows)[:, None]
    p_x += row_offset(o_row, x_inner, x_outer, x_step)[:, None]
    p_y += o_row[:, None] * D
    if p_residual is not None:
        p_residual += row_offset(o_row, residual_inner, residual_outer, residual_step)[:, None]
        p_sum += o_row[:, None] * D
    if p_gate is not None:
        p_gate += row_offset(o_row, gate_inner, gate_outer, gate_step)[:, None]
    o_block = tl.arange(0, BLOCK)[None, :]
    if D <= BLOCK:
        m_d = o_block < D
        b_x = _values(p_x, p_residual, o_block, m_row & m_d, rounded)  # (ROWS, BLOCK)
        b_weight = None
        if p_weight is not None:  # on its way while the squares are summed
            b_weight = tl.load(p_weight + o_block, mask=m_d, other=0.0)
        if p_sum is not None:
            tl.store(p_sum + o_block, b_x.to(p_sum.dtype.element_ty), mask=m_row & m_d)
        scale = _inverse_root(tl.sum(b_x * b_x, 1), count, eps)  # (ROWS,)
        _write(b_x, scale, b_weight, p_gate, p_y, o_block, m_row & m_d, rounded)
    else:
        b_square = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            o_d = start + o_block
            mask = m_row & (o_d < D)
            b_x = _values(p_x, p_residual, o_d, mask, rounded)
            b_square += b_x * b_x
            if p_sum is not None:
                tl.store(p_sum + o_d, b_x.to(p_sum.dtype.element_ty), mask=mask)
        scale = _inverse_root(tl.sum(b_square, 1), count, eps)
        for start in range(0, D, BLOCK):
            o_d = start + o_block
            m_d = o_d < D
            b_x = _values(p_x, p_residual, o_d, m_row & m_d, rounded)
            b_weight = None
            if p_weight is not None:
                b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
            _write(b_x, scale, b_weight, p_gate, p_y, o_d, m_row & m_d, rounded)


@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_kernel(
    p_x,  # (n_rows, D)
    p_weight,  # (D,) or None
    p_bias,  # (D,) or None
    p_y,  # (n_rows, D), contiguous
    n_rows,
    x_inner,
    x_outer,
    x_step,
    D: tl.constexpr,
    eps: tl.constexpr,
    early: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows, BLOCK columns at a time; a row is read again for its variance and its result, from the cache."""
    before_the_next(early)
    after_the_last(early)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = (o_row < n_rows)[:, None]
    p_x += row_offset(o_row, x_inner, x_outer, x_step)[:, None]
    p_y += o_row[:, None] * D
    o_block = tl.arange(0, BLOCK)[None, :]
    rounded: tl.constexpr = p_y.dtype.element_ty
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        b_sum += _values(p_x, None, start + o_block, m_row & (start + o_block < D), rounded)
    mean = tl.div_rn(tl.sum(b_sum, 1), tl.full([], D, tl.float32))[:, None]  # (ROWS, 1)
    b_square = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        m_d = start + o_block < D
        b_x = tl.where(m_d, _values(p_x, None, start + o_block, m_row & m_d, rounded) - mean, 0.0)
        b_square += b_x * b_x
    scale = _inverse_root(tl.sum(b_square, 1), D, eps)[:, None]
    for start in range(0, D, BLOCK):
        o_d = start + o_block
        m_d = o_d < D
        b_y = ((_values(p_x, None, o_d, m_row & m_d, rounded) - mean) * scale).to(rounded).to(tl.float32)
        if p_weight is not None:
            b_y = (b_y * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)).to(rounded).to(tl.float32)
        if p_bias is not None:
            b_y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_y + o_d, b_y.to(rounded), mask=m_row & m_d)


def _shape(x: Tensor) -> tuple[int, tuple[int], dict[str, Any], dict[str, Any]]:
    """Rows, grid, constants and options for norms of x."""
    columns = x.shape[-1]
    n_rows = x.numel() // columns
    tuned = config("norm", x.device, columns=columns, rows=n_rows)
    block = min(next_power_of_2(columns), tuned["BLOCK"])
    constants = {"D": columns, "ROWS": tuned["ROWS"], "BLOCK": block}
    return n_rows, (cdiv(n_rows, tuned["ROWS"]),), constants, {"num_warps": tuned["num_warps"]}


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    mean: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The norm of x, or of x + residual: (..., D), and that sum or None.

    dtype is what x, residual and weight promote to. The norm is then multiplied with silu(gate), and has its type.
    Without `mean` it is the l2 norm: the squares are summed, not averaged.
    """
    y = torch.empty(x.shape, dtype=dtype if gate is None else gate.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y, total
    n_rows, grid, constants, options = _shape(x)
    at_x, at_residual, at_gate = (rows(x if t is None else t) for t in (x, residual, gate))
    launch(
        rms_norm_kernel,
        grid,
        at_x.tensor,
        None if residual is None else at_residual.tensor,
        None if gate is None else at_gate.tensor,
        weight,
        y,
        total,
        n_rows,
        *at_x[1:],
        *at_residual[1:],
        *at_gate[1:],
        options=options,
        **constants,
        count=x.shape[-1] if mean else 1,
        eps=eps,
        rounded=_TYPES[dtype],
    )
    return y, total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """The layer norm of x (..., D), as dtype; every step of it is rounded to that."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    n_rows, grid, constants, options = _shape(x)
    at = rows(x)
    launch(layer_norm_kernel, grid, at.tensor, weight, bias, y, n_rows, *at[1:], options=options, **constants, eps=eps)
    return y
