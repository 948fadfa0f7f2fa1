"""A quantised matrix, or a stack of them, written out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.launch import launch
from gfxlm.kernels.linear.codes import load_scales
from gfxlm.kernels.linear.planes import code_units, format_of, load_halves, operands, plane_codes, spread
from gfxlm.kernels.packed import Packed
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config


@triton.jit
def interleave(planes, COUNT: tl.constexpr):
    """Tiles (R, C) of COUNT planes to one (R, C * COUNT) in the order of K."""
    if COUNT == 2:
        return tl.interleave(planes[0], planes[1])
    else:
        even = ()
        odd = ()
        for i in tl.static_range(0, COUNT, 2):
            even = even + (planes[i],)  # noqa: RUF005
            odd = odd + (planes[i + 1],)  # noqa: RUF005
        return tl.interleave(interleave(even, COUNT // 2), interleave(odd, COUNT // 2))


@triton.jit
def dequantize_kernel(
    p_w,  # int16 (R, K * BITS / 16)
    p_scales,  # (R, K / GROUP), strided
    p_biases,
    p_y,  # (R, K)
    R,
    stride_w,
    stride_scale,
    stride_group,
    K: tl.constexpr,
    BITS: tl.constexpr,
    PERIOD: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """BLOCK_R rows, BLOCK_W periods of each."""
    periods: tl.constexpr = K // PERIOD
    groups: tl.constexpr = max(1, BLOCK_W * PERIOD // GROUP)
    blocks: tl.constexpr = tl.cdiv(periods, BLOCK_W)
    first = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R
    start = tl.program_id(0) % blocks * BLOCK_W
    o_r = tl.arange(0, BLOCK_R)[:, None]
    m_r = first + o_r < R
    o_p = start + tl.arange(0, BLOCK_W)[None, :]
    b_w = load_halves(p_w + first * stride_w + o_r * stride_w, o_p, m_r & (o_p < periods), PERIOD * BITS // 16)
    o_g = start * PERIOD // GROUP + tl.arange(0, groups)[None, :]
    o_s = first * stride_scale + o_r * stride_scale + o_g * stride_group
    b_scale, b_bias = load_scales(p_scales, p_biases, o_s, m_r & (o_g < K // GROUP), SCALES)
    b_scale = spread(b_scale, BLOCK_R, groups, BLOCK_W)
    b_bias = spread(b_bias, BLOCK_R, groups, BLOCK_W)
    planes = ()
    for plane in tl.static_range(PERIOD):
        b_units = code_units(plane_codes(b_w, plane, BITS), BITS, MODE)
        b_plane = b_units * b_scale
        if MODE == "affine":  # every step but the last is exact
            b_plane = (b_units - 1.0) * (b_scale * (1 << BITS)) + b_bias
        planes = planes + (b_plane.to(p_y.dtype.element_ty),)  # noqa: RUF005
    o_k = start * PERIOD + tl.arange(0, BLOCK_W * PERIOD)[None, :]
    b_y = interleave(planes, PERIOD)
    tl.store(p_y + first * K + o_r * K + o_k, b_y, mask=m_r & (o_k < K))


def dequantize(packed: Packed, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix (N, K), or stack (E, N, K), that the codes stand for, in `dtype`, each number rounded once.

    `out`, contiguous, receives it. A stack's matrices must follow one another as their rows do.
    """
    constants = format_of(packed)
    columns = packed.columns
    rows = packed.words.shape[:-1].numel()
    shape = (*packed.words.shape[:-1], columns)
    y = torch.empty(shape, dtype=dtype, device=packed.words.device) if out is None else out
    if y.numel() == 0:
        return y
    tuned = config("dequantize", y.device, bits=packed.bits, k=columns)
    block_r, block_k = tuned.pop("block_r"), tuned.pop("block_k")
    block_w = min(block_k // int(constants["PERIOD"]), next_power_of_2(columns // int(constants["PERIOD"])))
    words, scales, biases = operands(packed)
    launch(
        dequantize_kernel,
        (cdiv(rows, block_r) * cdiv(columns // int(constants["PERIOD"]), block_w),),
        words,
        scales,
        biases,
        y,
        rows,
        words.stride(-2),
        *scales.stride()[-2:],
        K=columns,
        **constants,
        BLOCK_R=block_r,
        BLOCK_W=block_w,
        options=tuned,
    )
    return y
