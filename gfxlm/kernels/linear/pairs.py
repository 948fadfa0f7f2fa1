"""Products of units with half-precision inputs, two codes a word, where one instruction multiplies a pair.

A code joins the mantissa of a power of two, and the offset is taken off the sum: the numbers are exact and a weight
costs little more than its half of a multiplication. Integer-to-float conversion runs at a fraction of that rate.
"""

import triton
import triton.language as tl

from gfxlm.kernels.inline import dot2, join_pair, look_up
from gfxlm.kernels.linear.codes import unit_code


@triton.jit
def pair_inputs(inputs, bits: tl.constexpr):
    """Half-precision inputs of units as 16 int32 tensors, paired as `unit_dot` pairs the codes."""
    pairs = ()
    for i in tl.static_range(16):
        pairs = pairs + (_input_pair(inputs, i, 16 // bits if 32 % bits == 0 else 1),)  # noqa: RUF005
    return pairs


@triton.jit
def _input_pair(inputs, i: tl.constexpr, apart: tl.constexpr):
    first: tl.constexpr = i // apart * (2 * apart) + i % apart
    return join_pair(inputs[first], inputs[first + apart])


@triton.jit
def _code_pair(words, i: tl.constexpr, shift: tl.constexpr, mask: tl.constexpr, bits: tl.constexpr):
    """Pair number i, 0 to 15, of units' codes, each shifted right and masked, in the halves of a word."""
    if 32 % bits == 0:
        # The codes half a word apart lie where the halves of a pair do.
        apart: tl.constexpr = 16 // bits
        word = words[i // apart]
        return (word >> (i % apart * bits + shift)) & (mask << 16 | mask)
    else:
        low, high = unit_code(words, 2 * i, bits), unit_code(words, 2 * i + 1, bits)
        return low | (high << 16)


@triton.jit
def pair_sums(pairs, bits: tl.constexpr, dtype: tl.constexpr, native: tl.constexpr):
    """For `unit_dot`: the sum of the inputs, and what their products with the powers of two add up to, negated."""
    ones: tl.constexpr = 0x3F803F80 if dtype == "bfloat16" else 0x3C003C00
    zero = tl.zeros_like(pairs[0]).to(tl.float32)
    one = tl.full(pairs[0].shape, ones, tl.int32)
    even, odd = zero, zero
    for i in tl.static_range(0, 16, 2):
        even = dot2(pairs[i], one, even, dtype, native)
        odd = dot2(pairs[i + 1], one, odd, dtype, native)
    total = even + odd
    if dtype == "bfloat16":
        return total, total * (-128.0 * 17 if bits == 8 else -128.0)
    elif bits == 4:
        return total, even * -1024.0 - odd * 64.0
    else:
        return total, total * -1024.0


@triton.jit
def unit_dot(words, pairs, offset, bits: tl.constexpr, dtype: tl.constexpr, native: tl.constexpr):
    """Sum over units of input times code, fp32 (A, B); offset is `pair_sums`' second."""
    magic: tl.constexpr = 0x43004300 if dtype == "bfloat16" else 0x64006400  # 128 or 1024, where a step is 1
    mask: tl.constexpr = (1 << bits) - 1
    low = tl.zeros_like(words[0]).to(tl.float32) + offset
    high = tl.zeros_like(low)
    for i in tl.static_range(16):
        if dtype == "bfloat16" and bits == 8:  # seven bits of mantissa: a half of the code at a time
            low = dot2(_code_pair(words, i, 0, 15, bits) | magic, pairs[i], low, dtype, native)
            high = dot2(_code_pair(words, i, 4, 15, bits) | magic, pairs[i], high, dtype, native)
        elif dtype == "float16" and bits == 4 and i % 2 == 1:  # ten bits: every other code stays 4 bits up
            high = dot2(_code_pair(words, i, -4, 240, bits) | magic, pairs[i], high, dtype, native)
        else:
            low = dot2(_code_pair(words, i, 0, mask, bits) | magic, pairs[i], low, dtype, native)
    if dtype == "bfloat16" and bits == 8:
        return low + high * 16.0
    elif dtype == "float16" and bits == 4:
        return low + high * 0.0625
    else:
        return low


@triton.jit
def e2m1_dot(
    words, pairs, first: tl.constexpr, n: tl.constexpr, dtype: tl.constexpr, native: tl.constexpr
):  # fmt: skip
    """Sum over n words of 4-bit floats, from the first-th of each unit on, of input times value, fp32 (A, B)."""
    dot = tl.zeros_like(words[0]).to(tl.float32)
    for i in tl.static_range(first, first + n):
        even, odd = words[i], words[i] >> 4
        p04, p26 = _e2m1_pairs(even & 0x07070707, (even & 0x08080808) << 4, dtype, native)
        p15, p37 = _e2m1_pairs(odd & 0x07070707, even & -2139062144, dtype, native)
        dot = dot2(p04, pairs[4 * i], dot, dtype, native)
        dot = dot2(p15, pairs[4 * i + 1], dot, dtype, native)
        dot = dot2(p26, pairs[4 * i + 2], dot, dtype, native)
        dot = dot2(p37, pairs[4 * i + 3], dot, dtype, native)
    return dot


@triton.jit
def _e2m1_pairs(magnitudes, signs, dtype: tl.constexpr, native: tl.constexpr):
    """Bytes 0 and 2, and bytes 1 and 3, as pairs of half-precision numbers: three bits of magnitude, and the sign's."""
    if dtype == "bfloat16":
        upper = look_up(magnitudes, 0x3F3F3F00, 0x40404040, native) | signs
        lower = look_up(magnitudes, -1065353216, -1065336832, native)
        return (lower & 0x00FF00FF) | ((upper & 0x00FF00FF) << 8), ((lower >> 8) & 0x00FF00FF) | (upper & -16711936)
    else:
        upper = look_up(magnitudes, 0x3E3C3800, 0x46444240, native) | signs
        return (upper & 0x00FF00FF) << 8, upper & -16711936


@triton.jit
def as_float16(inputs):
    """32 bfloat16 inputs of units as float16 and the power of two that they were divided by, which brings the largest
    near 1: what is lost is below 2**-24 of that."""
    largest = tl.abs(inputs[0].to(tl.float32))
    for i in tl.static_range(1, 32):
        largest = tl.maximum(largest, tl.abs(inputs[i].to(tl.float32)))
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    inverse = tl.maximum(0x7F000000 - exponent, 0x00800000)
    factor = inverse.to(tl.float32, bitcast=True)
    scaled = ()
    for i in tl.static_range(32):
        scaled = scaled + ((inputs[i].to(tl.float32) * factor).to(tl.float16),)  # noqa: RUF005
    return scaled, (0x7F000000 - inverse).to(tl.float32, bitcast=True)
