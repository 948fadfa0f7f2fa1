"""Packed words to numbers, inside kernels: every format that MLX stores, in tensors of any blocking.

Codes are one bit stream along K, least significant bit first. 32 codes fill exactly `bits` words, whatever the width:
that many are a *unit*, and codes of 3, 5 and 6 bits cross the borders of words only within one.
"""

import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.inline import split_pair
from gfxlm.kernels.packed import Packed

UNIT = tl.constexpr(32)  # codes


def scale_layout(packed: Packed) -> str:
    """How the scales lie, as `load_scales` takes it: a pair's type, "apart", "e8m0" or "e4m3"."""
    if packed.mode != "affine":
        return "e4m3" if packed.mode == "nvfp4" else "e8m0"
    return "apart" if packed.pairs is None else str(packed.scales.dtype).removeprefix("torch.")


def scale_arguments(packed: Packed) -> tuple[Tensor, Tensor | None, str]:
    """What `load_scales` reads: the scales or their pairs, biases of the same strides, and how they lie."""
    layout, scales, biases = scale_layout(packed), packed.scales, packed.biases
    if layout == "apart" and biases is not None and scales.stride() != biases.stride():
        scales, biases = scales.contiguous(), biases.contiguous()
    return scales if packed.pairs is None else packed.pairs, biases, layout


@triton.jit
def load_scales(p_scales, p_biases, offsets, mask, layout: tl.constexpr):
    """Scale and bias of groups as fp32, the bias of a float mode being 0. `layout` is `scale_arguments`'.

    For a pair, p_scales is `Packed.pairs` and p_biases is not read; nor is it for the float modes.
    """
    return scale_values(load_stored(p_scales, p_biases, offsets, mask, layout), layout)


@triton.jit
def load_stored(p_scales, p_biases, offsets, mask, layout: tl.constexpr):
    """`load_scales` before any arithmetic: a tuple for `scale_values`."""
    other: tl.constexpr = None if mask is None else 0
    scales = tl.load(p_scales + offsets, mask=mask, other=other)
    if layout == "apart":
        return scales, tl.load(p_biases + offsets, mask=mask, other=other)
    else:
        return (scales,)


@triton.jit
def scale_values(stored, layout: tl.constexpr):
    """Scale and bias as fp32 of what `load_stored` read."""
    if layout == "apart":
        return stored[0].to(tl.float32), stored[1].to(tl.float32)
    elif layout == "bfloat16" or layout == "float16":
        return split_pair(stored[0], layout)
    else:
        scales = float_scale(stored[0], layout)
        return scales, tl.zeros_like(scales)


@triton.jit
def float_scale(stored, layout: tl.constexpr):
    """fp32 of a uint8 scale: E4M3 ("e4m3"), or the power of two 2**(s - 127) ("e8m0"), subnormal for s = 0."""
    if layout == "e4m3":
        return e4m3(stored.to(tl.int32))
    else:
        bits = stored.to(tl.int32)
        return tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)


@triton.jit
def code_value(codes, mode: tl.constexpr):
    """fp32 of int32 codes. Affine: the unsigned code itself, scale and bias still to be applied."""
    if mode == "affine":
        return codes.to(tl.float32)
    elif mode == "mxfp8":
        return e4m3(codes)
    else:
        return e2m1(codes)


@triton.jit
def e2m1(codes):
    """fp32 of 4-bit floats. Its fields moved into fp32's are the value times 2**-126, subnormals included."""
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126


@triton.jit
def e4m3(codes):
    """fp32 of 8-bit floats, as `e2m1`. The two codes of NaN read as 480."""
    bits = ((codes & 127) << 20) | ((codes & 128) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def unit_code(words, i: tl.constexpr, bits: tl.constexpr):
    """Code number i, 0 to 31, of units, whose words are a tuple of `bits` int32 tensors."""
    first: tl.constexpr = i * bits // 32
    shift: tl.constexpr = i * bits % 32
    if shift + bits <= 32:
        return (words[first] >> shift) & ((1 << bits) - 1)
    else:
        kept: tl.constexpr = 32 - shift
        low = (words[first] >> shift) & ((1 << kept) - 1)
        return low | ((words[first + 1] << kept) & ((1 << bits) - 1))


@triton.jit
def load_unit(p_words, offsets, mask, bits: tl.constexpr):
    """The `bits` words of units as a tuple of int32 tensors; offsets (1, U), in words, are where the units begin.

    Widths of 2, 4 and 8 are read 8 or 16 bytes a lane.
    """
    if bits == 8:
        return _load_words(p_words, offsets, mask, 4) + _load_words(p_words + 4, offsets, mask, 4)
    elif bits == 4 or bits == 2:
        return _load_words(p_words, offsets, mask, bits)
    else:
        other: tl.constexpr = None if mask is None else 0
        words = ()
        for i in tl.static_range(bits):
            words = words + (tl.load(p_words + offsets + i, mask=mask, other=other),)  # noqa: RUF005
        return words


@triton.jit
def _load_words(p_words, offsets, mask, n: tl.constexpr):
    """n neighbours, 2 or 4, at offsets (1, U), as a tuple."""
    other: tl.constexpr = None if mask is None else 0
    at = (p_words + offsets)[:, :, None] + tl.arange(0, n)[None, None, :]
    loaded = tl.load(at, mask=None if mask is None else mask[:, :, None], other=other)
    if n == 2:
        return tl.split(loaded)
    else:
        even, odd = tl.split(tl.reshape(loaded, [offsets.shape[0], offsets.shape[1], 2, 2]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        return w0, w1, w2, w3


@triton.jit
def load_codes(p_words, o_rows, o_k, mask, bits: tl.constexpr):
    """The codes at columns o_k of the rows that begin o_rows words after p_words, as int32, element by element.

    o_rows, o_k and mask broadcast against each other, as o_rows (N, 1) and o_k (1, K) do: a tile (N, K).
    """
    o_bits = o_k * bits
    shift = o_bits % 32
    at = p_words + o_rows + o_bits // 32
    words = tl.load(at, mask=mask, other=0)
    if 32 % bits == 0:
        return (words >> shift) & ((1 << bits) - 1)
    else:
        crosses = shift + bits > 32
        after = tl.load(at + 1, mask=mask & crosses, other=0)
        low = (words.to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)).to(tl.int32, bitcast=True)
        high = tl.where(crosses, after << ((32 - shift) & 31), 0)
        return (low | high) & ((1 << bits) - 1)
