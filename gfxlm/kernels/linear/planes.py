"""Codes as matrix units take them: by planes, so that none ever moves from lane to lane.

`period` neighbouring codes fill whole 16-bit halves of a row's bit stream: 4 codes of 4 bits are one half, 16 codes of
3 bits are three. Plane j holds code j of every period. A product over K is the sum of the planes' products, provided
that x is dealt into planes too, which costs one pass over x.
"""

from math import lcm

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.linear.codes import code_value, load_scales, scale_arguments, scale_layout
from gfxlm.kernels.packed import Packed

Format = dict[str, int | str]


def format_of(packed: Packed | Tensor) -> Format:
    """The compile-time facts of a weight's format. A Tensor is a dense weight: codes of 16 or 32 bits, one a period."""
    if isinstance(packed, Tensor):
        return {"BITS": 16, "PERIOD": 1, "GROUP": packed.shape[-1], "MODE": "dense", "SCALES": "none"}
    period = lcm(packed.bits, 16) // packed.bits
    return {
        "BITS": packed.bits,
        "PERIOD": period,
        "GROUP": packed.group_size,
        "MODE": packed.mode,
        "SCALES": scale_layout(packed),
    }


def operands(packed: Packed | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales and biases as kernels take them; what a format lacks is filled with something that is not read."""
    if isinstance(packed, Tensor):
        return packed, packed, packed
    scales, biases, _ = scale_arguments(packed)
    return packed.words.view(torch.int16), scales, scales if biases is None else biases


def unpacking(wanted: str, x: Tensor, packed: Packed | Tensor) -> str:
    """How `tile_dot` makes numbers of codes: the `wanted` way where it serves this product, else "plain".

    "plain" makes each weight in fp32 and rounds it to x's dtype. "ptx" does so by `native_planes`. "sums" multiplies
    1 + code / 2**bits, which takes a shift and a mask, and applies scale and bias to the sum over a group.
    """
    if isinstance(packed, Tensor) or packed.mode != "affine" or x.itemsize != 2:
        return "plain"
    mantissa = 7 if x.dtype == torch.bfloat16 else 10
    serves = {
        "ptx": packed.bits == 4 and packed.scales.dtype == x.dtype,
        "sums": packed.bits in (2, 4, 8) and packed.bits <= mantissa and packed.group_size * packed.bits >= 256,
    }
    return wanted if serves.get(wanted, False) else "plain"


def tile_periods(block_k: int, packed: Packed | Tensor, unpack: str) -> int:
    """Periods that a tile of `block_k` columns has: no fewer than a matrix unit takes, for "sums" within one group."""
    fmt = format_of(packed)
    if unpack == "sums":
        block_k = min(block_k, int(fmt["GROUP"]))
    return max(16, block_k // int(fmt["PERIOD"]))


@triton.jit
def load_halves(p_w, o_period, mask, COUNT: tl.constexpr):
    """The 16-bit halves of whole periods: a tuple of COUNT tiles."""
    halves = ()
    for i in tl.static_range(COUNT):
        halves = halves + (tl.load(p_w + o_period * COUNT + i, mask=mask, other=0),)  # noqa: RUF005
    return halves


@triton.jit
def plane_codes(halves, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Codes of one plane as int32, from the halves of their periods."""
    first: tl.constexpr = PLANE * BITS // 16
    shift: tl.constexpr = PLANE * BITS % 16
    codes = (halves[first].to(tl.int32) & 0xFFFF) >> shift
    if shift + BITS > 16:
        codes |= halves[first + 1].to(tl.int32) << (16 - shift)
    return codes & ((1 << BITS) - 1)


@triton.jit
def plane_units(halves, PLANE: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """1 + code / 2**BITS of one plane in a 16-bit type whose mantissa holds a code; no code crosses halves."""
    mantissa: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    right: tl.constexpr = PLANE * BITS - (mantissa - BITS)
    moved = halves[0] >> right if right >= 0 else halves[0] << -right
    one: tl.constexpr = 0x3F80 if dtype == tl.bfloat16 else 0x3C00
    return ((moved & (((1 << BITS) - 1) << (mantissa - BITS))) | one).to(dtype, bitcast=True)


@triton.jit
def code_units(codes, BITS: tl.constexpr, MODE: tl.constexpr):
    """fp32 of codes: 1 + code / 2**BITS for affine, which takes no conversion, else the value itself."""
    if MODE == "affine":
        return ((codes << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)
    else:
        return code_value(codes, MODE)


def _unpack(kind: str, magic: int, one: int, offset: int) -> str:
    """PTX that makes four pairs of numbers of two 16-bit halves, $4, with pairs of scales, $5, and biases, $6.

    A code in the low mantissa bits of the number `magic` is added to it; `offset`, its negative, takes that away.
    """
    lines = [".reg .b32 w, u, one, offset;", f"mov.b32 one, {one:#x};", f"mov.b32 offset, {offset:#x};"]
    for plane in range(4):
        lines += [
            f"shr.b32 w, $4, {4 * plane};",
            f"lop3.b32 u, w, 0x000F000F, {magic:#x}, 0xEA;",  # (w & mask) | magic
            f"fma.rn.{kind} u, u, one, offset;",
            f"fma.rn.{kind} ${plane}, u, $5, $6;",
        ]
    return "{ " + " ".join(lines) + " }"


_UNPACK_BF16 = tl.constexpr(_unpack("bf16x2", 0x43004300, 0x3F803F80, 0xC300C300))
_UNPACK_F16 = tl.constexpr(_unpack("f16x2", 0x64006400, 0x3C003C00, 0xE400E400))


@triton.jit
def native_planes(halves, scales, biases):
    """`scale * code + bias` of 4-bit codes on NVIDIA, two at a time and rounded once: four planes in the scales' type.

    The operands are 16-bit tensors of one shape.
    """
    return tl.inline_asm_elementwise(
        _UNPACK_BF16 if scales.dtype == tl.bfloat16 else _UNPACK_F16,
        "=&r,=&r,=&r,=&r,r,r,r",
        [halves, scales, biases],
        dtype=(scales.dtype, scales.dtype, scales.dtype, scales.dtype),
        is_pure=True,
        pack=2,
    )


@triton.jit
def spread(b_group, ROWS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, GROUPS) to (ROWS, COLUMNS), each repeated for its neighbours; one group is left to broadcasting."""
    if GROUPS == 1:
        return b_group
    else:
        wide = tl.broadcast_to(b_group[:, :, None], [ROWS, GROUPS, COLUMNS // GROUPS])
        return tl.reshape(wide, [ROWS, COLUMNS])


@triton.jit
def tile_dot(
    acc,  # fp32 (BLOCK_N, BLOCK_M)
    p_w,  # int16, the matrix
    p_scales,
    p_biases,
    o_w,  # (BLOCK_N,) offset of each row of w
    o_s,  # (BLOCK_N,) offset of each row of scales
    stride_group,
    p_x,  # (BLOCK_M,) each row of x, dealt into planes
    p_sums,  # (BLOCK_M,) each row of x's `tile_sums`, for UNPACK "sums"
    m_x,  # (BLOCK_M,) which rows of x there are
    split,  # which of the SPLITS shares of K
    K: tl.constexpr,
    BITS: tl.constexpr,
    PERIOD: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    SCALES: tl.constexpr,
    UNPACK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """acc + w @ x.T over one share of K, BLOCK_W periods at a time.

    The weight is the first operand: its planes stay in registers.
    """
    rows: tl.constexpr = acc.shape[0]
    periods: tl.constexpr = K // PERIOD
    groups: tl.constexpr = max(1, BLOCK_W * PERIOD // GROUP)
    tiles: tl.constexpr = (periods + BLOCK_W * SPLITS - 1) // (BLOCK_W * SPLITS)  # of a share
    even: tl.constexpr = periods == tiles * SPLITS * BLOCK_W
    dtype: tl.constexpr = p_x.dtype.element_ty
    # A mask of constants vanishes.
    all_p = tl.full([BLOCK_W], True, tl.int1)
    all_g = tl.full([groups], True, tl.int1)
    for i in range(tiles):
        # Written as a product, a start is known to be aligned: loads are not pipelined otherwise.
        start = (split * tiles + i) * BLOCK_W
        o_p = start + tl.arange(0, BLOCK_W)
        m_p = all_p if even else o_p < periods
        b_w = load_halves(p_w + o_w[:, None], o_p[None, :], m_p[None, :], PERIOD * BITS // 16)  # (BLOCK_N, BLOCK_W)
        if MODE != "dense":
            o_g = start * PERIOD // GROUP + tl.arange(0, groups)
            m_g = (all_g if even else o_g < K // GROUP)[None, :]
            o_sg = o_s[:, None] + o_g[None, :] * stride_group
            b_scale, b_bias = load_scales(p_scales, p_biases, o_sg, m_g, SCALES)  # (BLOCK_N, groups)
            if UNPACK == "ptx":
                b_scale = tl.broadcast_to(spread(b_scale.to(dtype), rows, groups, BLOCK_W), [rows, BLOCK_W])
                b_bias = tl.broadcast_to(spread(b_bias.to(dtype), rows, groups, BLOCK_W), [rows, BLOCK_W])
                b_planes = native_planes(b_w[0], b_scale, b_bias)
            else:
                if MODE == "affine":  # scale * code + bias, for codes that come as 1 + code / 2**BITS
                    b_scale *= 1 << BITS
                    b_bias -= b_scale
                b_scale = spread(b_scale, rows, groups, BLOCK_W)
                b_bias = spread(b_bias, rows, groups, BLOCK_W)
        if UNPACK == "sums":
            b_part = tl.zeros_like(acc)
        for plane in tl.static_range(PERIOD):
            o_x = plane * periods + o_p[:, None]
            m_b = m_p[:, None] & m_x[None, :]
            b_x = tl.load(p_x[None, :] + o_x, mask=m_b, other=0)  # (BLOCK_W, BLOCK_M)
            if UNPACK == "sums":
                b_part = tl.dot(plane_units(b_w, plane, BITS, dtype), b_x, b_part)
            else:
                if MODE == "dense":
                    b_plane = b_w[0]
                elif UNPACK == "ptx":
                    b_plane = b_planes[plane]
                else:
                    b_plane = code_units(plane_codes(b_w, plane, BITS), BITS, MODE) * b_scale
                    if MODE == "affine":
                        b_plane += b_bias
                acc = tl.dot(b_plane.to(dtype), b_x, acc, input_precision="ieee")
        if UNPACK == "sums":
            m_sums = m_x if even else tl.where(start < periods, m_x, False)
            acc += b_scale * b_part + b_bias * tl.load(p_sums + start // BLOCK_W, mask=m_sums, other=0)[None, :]
    return acc
