"""A few rows times a quantised matrix on the vector units: a lane owns units of 32 weights, whatever their format.

Memory bounds it, so what counts is bytes in flight and instructions a weight: see `units`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.device.arch import architecture
from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.inline import dot2_type
from gfxlm.kernels.launch import launch
from gfxlm.kernels.layout import adjacent
from gfxlm.kernels.linear.codes import load_unit, scale_arguments
from gfxlm.kernels.linear.units import load_inputs, unit_products, unit_scales
from gfxlm.kernels.packed import Packed
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config


@triton.jit
def _row(i, n_out, first, swiglu: tl.constexpr):
    """Row of w that is a block's i-th; with swiglu, rows of gate and of up take turns. None lies past the end."""
    if swiglu:
        return tl.minimum(first + i // 2, n_out - 1).to(tl.int64) + i % 2 * n_out
    else:
        return tl.minimum(first + i, n_out - 1).to(tl.int64)


@triton.jit
def _load_row(
    p_words, p_scales, p_biases, row, o_u, stride_row, stride_group,
    n_units: tl.constexpr, bits: tl.constexpr, group_size: tl.constexpr, layout: tl.constexpr,
):  # fmt: skip
    """Words and scales of units o_u (1, U) of a row."""
    # A unit is `bits` words: what divides those of a row also divides its beginning.
    p_row = tl.multiple_of(p_words + row * (n_units * bits), [4 * (bits & -bits)])
    words = load_unit(p_row, o_u * bits, None, bits)
    return words, unit_scales(p_scales, p_biases, row * stride_row, o_u * 32, stride_group, group_size, layout)


@triton.jit
def _stack(values, first: tl.constexpr, step: tl.constexpr, n: tl.constexpr):
    """Every step-th of a tuple's tensors (1, U), n of them, side by side: (1, U, n)."""
    if n == 1:
        return values[first][:, :, None]
    else:
        even, odd = _stack(values, first, 2 * step, n // 2), _stack(values, first + step, 2 * step, n // 2)
        return tl.reshape(tl.join(even, odd), [1, even.shape[1], n])


@triton.jit
def matvec_kernel(
    p_x,  # (M, K)
    p_words,  # int32 (N, K * bits / 32)
    p_scales,  # (N, K / group_size): `Packed.pairs`, or its scales
    p_biases,
    p_bias,  # (N,) or None
    p_residual,  # (M, N) or None
    p_y,  # (M, N), or (M, N / 2) for swiglu
    M,
    N,
    stride_x,
    stride_row,  # of the scales
    stride_group,
    stride_residual,
    K: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    mode: tl.constexpr,
    layout: tl.constexpr,
    native: tl.constexpr,
    swiglu: tl.constexpr,
    early: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """BLOCK_M rows of x times BLOCK_N rows of w, BLOCK_U units of each at a time, those of w one step AHEAD."""
    n_units: tl.constexpr = K // 32
    n_out = N // 2 if swiglu else N
    step: tl.constexpr = BLOCK_N // 2 if swiglu else BLOCK_N
    m_blocks = tl.cdiv(M, BLOCK_M)  # next to each other, so that the second to read a weight finds it in the cache
    i_m = tl.program_id(0) % m_blocks * BLOCK_M
    i_n = tl.program_id(0) // m_blocks * step
    after_the_last(early)
    acc = ()
    for _ in tl.static_range(BLOCK_M * BLOCK_N):
        acc = acc + (tl.zeros([1, BLOCK_U], tl.float32),)  # noqa: RUF005
    o_block = tl.arange(0, BLOCK_U)[None, :]
    rows = ()
    if AHEAD:
        for i in tl.static_range(BLOCK_N):
            row = _load_row(
                p_words, p_scales, p_biases, _row(i, n_out, i_n, swiglu), tl.minimum(o_block, n_units - 1),
                stride_row, stride_group, n_units, bits, group_size, layout,
            )  # fmt: skip
            rows = rows + (row,)  # noqa: RUF005
    for start in range(0, n_units, BLOCK_U):
        o_u = start + o_block
        m_u = o_u < n_units if n_units % BLOCK_U else None
        if n_units % BLOCK_U:
            o_u = tl.minimum(o_u, n_units - 1)
        o_w = tl.minimum(start + BLOCK_U + o_block, n_units - 1) if AHEAD else o_u
        blocks = ()
        for m in tl.static_range(BLOCK_M):
            p_row = p_x + tl.minimum(i_m + m, M - 1).to(tl.int64) * stride_x
            blocks = blocks + (load_inputs(p_row, o_u * 32, m_u),)  # noqa: RUF005
        sums, following = (), ()
        for i in tl.static_range(BLOCK_N):
            row = _load_row(
                p_words, p_scales, p_biases, _row(i, n_out, i_n, swiglu), o_w, stride_row, stride_group,
                n_units, bits, group_size, layout,
            )  # fmt: skip
            if AHEAD:
                following = following + (row,)  # noqa: RUF005
                row = rows[i]
            for m in tl.static_range(BLOCK_M):
                products = unit_products(row[0], blocks[m], row[1], bits, group_size, mode, layout, native)
                sums = sums + (acc[i * BLOCK_M + m] + products,)  # noqa: RUF005
        acc = sums
        if AHEAD:
            rows = following
    before_the_next(early)
    for m in tl.static_range(BLOCK_M):
        o_m = (i_m + m).to(tl.int64)
        y = tl.reshape(tl.sum(_stack(acc, m, BLOCK_M, BLOCK_N), 1), [BLOCK_N])
        if swiglu:
            gate, up = tl.split(tl.reshape(y, [step, 2]))
            y = gate * tl.sigmoid(gate) * up
        o_y = i_n + tl.arange(0, step)
        m_y = o_y < tl.where(o_m < M, n_out, 0)
        if p_bias is not None:
            y += tl.load(p_bias + o_y, mask=m_y, other=0.0).to(tl.float32)
        if p_residual is not None:
            y += tl.load(p_residual + o_m * stride_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
        tl.store(p_y + o_m * n_out + o_y, y.to(p_y.dtype.element_ty), mask=m_y)


def matvec(
    x: Tensor, packed: Packed, *, bias: Tensor | None = None, residual: Tensor | None = None, swiglu: bool = False
) -> Tensor:
    """`x @ w.T + bias + residual`, rounded once, for a few rows x (M, K): (M, N) in x's type.

    bias (N,) and residual (M, N), whose rows may be strided. With `swiglu`, whose first N / 2 rows of w give gate and
    the rest up, `silu(gate) * up`, (M, N / 2).
    """
    outputs = packed.rows // 2 if swiglu else packed.rows
    y = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = adjacent(x)
    residual = None if residual is None else adjacent(residual)
    rows, columns = x.shape
    chosen = config("matvec", x.device, m=rows, n=packed.rows, k=columns, bits=packed.bits, half=x.element_size() == 2)
    block_m = min(next_power_of_2(rows), chosen["block_m"])
    block_n = chosen["block_n"]
    scales, biases, layout = scale_arguments(packed)
    launch(
        matvec_kernel,
        (cdiv(rows, block_m) * cdiv(outputs, block_n // 2 if swiglu else block_n),),
        x,
        packed.words.contiguous(),
        scales,
        biases,
        bias,
        residual,
        y,
        rows,
        packed.rows,
        x.stride(0),
        scales.stride(-2),
        scales.stride(-1),
        0 if residual is None else residual.stride(0),
        options={"num_warps": chosen["num_warps"]},
        K=columns,
        bits=packed.bits,
        group_size=packed.group_size,
        mode=packed.mode,
        layout=layout,
        native=dot2_type(architecture(x.device), str(x.dtype).removeprefix("torch.")),
        swiglu=swiglu,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_U=min(next_power_of_2(columns // 32), chosen["block_u"]),
        AHEAD=chosen.get("ahead", False),
    )
    return y
