"""Few rows times a quantised matrix on matrix units, for one to a few dozen rows at about the cost of one.

Codes are exact in the mantissa of a half-precision number and scales join afterwards, in fp32. A quad of lanes owns a
*span* of K, 16 or 32 neighbouring codes each, as they load them: in NVIDIA's operands' layout neither a code nor an
input moves to another lane, K being put into the order that this takes. Where a span holds several groups, each has
columns of its own, in which the other groups' inputs are zeros. Warps share the spans out among themselves and add up
at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.device.arch import architecture
from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.layout import adjacent
from gfxlm.kernels.linear.codes import load_scales, scale_arguments
from gfxlm.kernels.linear.operands import axis_row, repeat_rows, span_dot, span_inputs, span_sums, spread_scales
from gfxlm.kernels.packed import Packed
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def skinny_takes(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether there is a skinny kernel for the format and the type of x."""
    return packed.mode == "affine" and packed.bits in (2, 4, 8) and dtype in _NAMES


@triton.jit
def skinny_kernel(
    p_x,  # (M, K)
    p_words,  # int16 (N, K * bits / 16)
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
    layout: tl.constexpr,
    dtype: tl.constexpr,
    native: tl.constexpr,
    swiglu: tl.constexpr,
    early: tl.constexpr,
    CODES: tl.constexpr,
    SPLITS: tl.constexpr,
    SPANS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS * 8 columns, a row of x each or one of its groups, times TILES * 16 rows of w.

    A step of the loop is SPLITS * SPANS spans of K, a span being CODES for each lane of a quad.
    """
    groups: tl.constexpr = max(4 * CODES // group_size, 1)  # of a span: each has columns of its own
    columns: tl.constexpr = BLOCKS * 8
    m_rows: tl.constexpr = columns // groups
    n_lanes: tl.constexpr = K // CODES
    ragged: tl.constexpr = n_lanes % (4 * SPLITS * SPANS) != 0
    halves: tl.constexpr = CODES * bits // 16
    split_code: tl.constexpr = bits == 8 and dtype == "bfloat16"  # seven bits of mantissa: half a code at a time
    mask: tl.constexpr = 15 if split_code else (1 << bits) - 1
    offset: tl.constexpr = (128.0 * 17 if split_code else 128.0) if dtype == "bfloat16" else 1024.0
    rows: tl.constexpr = TILES * 16
    step: tl.constexpr = TILES * 8 if swiglu else rows
    n_out = N // 2 if swiglu else N
    m_blocks = tl.cdiv(M, m_rows)
    i_m = tl.program_id(0) % m_blocks * m_rows
    i_n = tl.program_id(0) // m_blocks * step
    after_the_last(early)
    # One axis, from the fastest on: four lanes of a quad, eight rows, splits of K, blocks of eight rows. Triton deals
    # it out to lanes, warps and registers in that order, as the operands have it.
    o_w = tl.arange(0, rows * SPLITS * 4)
    o_n = axis_row(o_w, SPLITS)
    # What lies past the end is read again: its inputs are zeros, or its results not stored.
    o_n = (tl.minimum(i_n + o_n % step, n_out - 1) + o_n // step * n_out).to(tl.int64)
    p_rows = p_words + o_n * (K * bits // 16)
    o_scales = o_n * stride_row
    o_x = tl.arange(0, CODES // 8 * columns * SPLITS * 4)
    column = axis_row(o_x, SPLITS)
    o_m = i_m + column // 8 % BLOCKS * (8 // groups) + column % (8 // groups)
    m_x = (o_m < M) & (column % 8 // (8 // groups) == o_x % 4 * groups // 4)
    p_inputs = p_x + (o_m.to(tl.int64) * stride_x + column // columns * 8)
    acc = tl.zeros([SPLITS, rows, columns], tl.float32)
    for start in range(0, n_lanes, 4 * SPLITS * SPANS):
        for i in tl.static_range(SPANS):
            lane = start + (o_x // 32 % SPLITS * SPANS + i) * 4 + o_x % 4
            m_k = m_x & (lane < n_lanes) if ragged else m_x
            at = (p_inputs + lane * CODES)[:, None] + tl.arange(0, 8)[None, :]
            inputs = span_inputs(tl.load(at, mask=m_k[:, None], other=0.0), columns, SPLITS, CODES, bits)
            total = repeat_rows(span_sums(inputs), TILES)
            lane = start + (o_w // 32 % SPLITS * SPANS + i) * 4 + o_w % 4
            if ragged:
                lane = tl.minimum(lane, n_lanes - 1)
            at = (p_rows + lane * halves)[:, None] + tl.arange(0, halves)[None, :]
            words = tl.load(at, eviction_policy="evict_first")
            # A lane's columns of the accumulator are of the group that it loads.
            o_group = o_scales + lane * CODES // group_size * stride_group
            scales, biases = load_scales(p_scales, p_biases, o_group, None, layout)
            dot = span_dot(words, inputs, rows, 0, mask, bits, dtype, native)
            if split_code:
                dot += 16.0 * span_dot(words, inputs, rows, 4, mask, bits, dtype, native)
            scales, biases = spread_scales(scales, rows, BLOCKS), spread_scales(biases, rows, BLOCKS)
            acc = acc + scales * dot + (biases - offset * scales) * total
    y = tl.reshape(tl.sum(acc, 0), [rows, BLOCKS, groups, 8 // groups])
    y = tl.reshape(tl.sum(y, 2), [rows, m_rows])
    if swiglu:
        gate, up = tl.split(tl.permute(tl.reshape(y, [2, step, m_rows]), (1, 2, 0)))
        y = gate * tl.sigmoid(gate) * up
    o_n = i_n + tl.arange(0, step)[:, None]
    o_m = (i_m + tl.arange(0, m_rows)[None, :]).to(tl.int64)
    m_y = (o_n < n_out) & (o_m < M)
    if p_bias is not None:
        y += tl.load(p_bias + o_n, mask=o_n < n_out, other=0.0).to(tl.float32)
    if p_residual is not None:
        y += tl.load(p_residual + o_m * stride_residual + o_n, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_m * n_out + o_n, y.to(p_y.dtype.element_ty), mask=m_y)
    before_the_next(early)


def skinny(
    x: Tensor, packed: Packed, *, bias: Tensor | None = None, residual: Tensor | None = None, swiglu: bool = False
) -> Tensor:
    """`x @ w.T + bias + residual`, rounded once, for x (M, K) that `skinny_takes`: (M, N) in x's type.

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
    arch = architecture(x.device)
    chosen = config("skinny", x.device, m=rows, n=packed.rows, k=columns, bits=packed.bits)
    codes = {2: 32, 4: chosen["codes"], 8: 16}[packed.bits]
    block_rows = 8 // max(4 * codes // packed.group_size, 1)
    blocks = next_power_of_2(cdiv(rows, block_rows))
    blocks = min(max(blocks, chosen["least_blocks"]), chosen["blocks"])
    tiles = chosen["tiles"]
    scales, biases, layout = scale_arguments(packed)
    launch(
        skinny_kernel,
        (cdiv(rows, blocks * block_rows) * cdiv(outputs, tiles * (8 if swiglu else 16)),),
        x,
        packed.words.contiguous().view(torch.int16),
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
        options={"num_warps": chosen["splits"], "num_stages": chosen["num_stages"]},
        K=columns,
        bits=packed.bits,
        group_size=packed.group_size,
        layout=layout,
        dtype=_NAMES[x.dtype],
        native=arch.vendor == "nvidia",
        swiglu=swiglu,
        CODES=codes,
        SPLITS=chosen["splits"],
        SPANS=chosen["spans"],
        TILES=tiles,
        BLOCKS=blocks,
    )
    return y
