"""Products of units, 32 weights with their 32 inputs, for kernels in which a lane owns whole units.

Where one instruction multiplies pairs of halves, see `pairs`. Elsewhere a code goes into the mantissa of an fp32.
"""

import triton
import triton.language as tl

from gfxlm.kernels.inline import mantissa
from gfxlm.kernels.linear.codes import code_value, load_stored, scale_values, unit_code
from gfxlm.kernels.linear.pairs import as_float16, e2m1_dot, pair_inputs, pair_sums, unit_dot


@triton.jit
def load_inputs(p_x, o_k, mask):
    """The 32 inputs of units as a tuple, each of the shape (1, U) of o_k, which is where the units begin."""
    lane: tl.constexpr = 128 // p_x.dtype.element_ty.primitive_bitwidth  # what one load of 16 bytes holds
    other: tl.constexpr = None if mask is None else 0.0
    inputs = ()
    for i in tl.static_range(0, 32, lane):
        o_x = (o_k + i)[:, :, None] + tl.arange(0, lane)[None, None, :]
        m_x = None if mask is None else mask[:, :, None]
        inputs = inputs + _deal(tl.load(p_x + o_x, mask=m_x, other=other), lane)
    return inputs


@triton.jit
def _deal(x, n: tl.constexpr):
    """(1, U, n) as a tuple of n tensors (1, U)."""
    if n == 1:
        return (tl.reshape(x, [x.shape[0], x.shape[1]]),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], n // 2, 2]))
        evens, odds = _deal(even, n // 2), _deal(odd, n // 2)
        dealt = ()
        for i in tl.static_range(n // 2):
            dealt = dealt + (evens[i], odds[i])  # noqa: RUF005
        return dealt


@triton.jit
def part_dot(
    words, inputs, first: tl.constexpr, n: tl.constexpr, bits: tl.constexpr, mode: tl.constexpr, native: tl.constexpr
):
    """Sums over n codes of units of input times code and of the inputs, in fp32, for inputs of any type."""
    total = inputs[first].to(tl.float32)
    for i in tl.static_range(first + 1, first + n):
        total += inputs[i].to(tl.float32)
    dot = tl.zeros_like(words[0]).to(tl.float32)
    if mode == "affine":
        dot -= total
    for i in tl.static_range(first, first + n):
        if mode == "affine":
            dot += _unit_number(words, i, bits, native) * inputs[i].to(tl.float32)
        else:
            dot += code_value(unit_code(words, i, bits), mode) * inputs[i].to(tl.float32)
    return (dot * (1 << bits) if mode == "affine" else dot), total


@triton.jit
def _unit_number(words, i: tl.constexpr, bits: tl.constexpr, native: tl.constexpr):
    """1 + code / 2**bits of code number i of units."""
    mask: tl.constexpr = ((1 << bits) - 1) << (23 - bits)
    if i * bits % 32 + bits <= 32:
        return mantissa(_shifted(words[i * bits // 32], 23 - bits - i * bits % 32), mask, native)
    else:
        return mantissa(unit_code(words, i, bits) << (23 - bits), mask, native)


@triton.jit
def _shifted(words, left: tl.constexpr):
    if left >= 0:
        return words << left
    else:
        return words >> -left


@triton.jit
def nibble_dot(words, inputs, native: tl.constexpr):
    """`part_dot` over whole units of affine 4-bit codes and half-precision inputs.

    A shift puts two codes into a mantissa, one at 2**-11 and one at 2**-7, where fp32 has bits enough to spare.
    """
    even, odd = inputs[0].to(tl.float32), inputs[1].to(tl.float32)
    for i in tl.static_range(2, 32, 2):
        even += inputs[i].to(tl.float32)
        odd += inputs[i + 1].to(tl.float32)
    low = tl.zeros_like(words[0]).to(tl.float32) - odd
    high = tl.zeros_like(words[0]).to(tl.float32) - even
    for i in tl.static_range(4):
        for code in tl.static_range(8):
            word = _shifted(words[i], 16 - 8 * ((code + 1) // 2))
            x = inputs[8 * i + code].to(tl.float32)
            if code % 2:
                low += mantissa(word, 0x0000F000, native) * x
            else:
                high += mantissa(word, 0x000F0000, native) * x
    return low * 2048.0 + high * 128.0, even + odd


@triton.jit
def unit_scales(
    p_scales,
    p_biases,
    o_scales,  # where the row's scales begin
    o_k,  # (1, U)
    stride_group,
    group_size: tl.constexpr,
    layout: tl.constexpr,
):
    """What is stored of the scales of units that begin at o_k, as `unit_products` takes it: a tuple for each group."""
    stored = ()
    for first in tl.static_range(0, 32, min(group_size, 32)):
        o_group = o_scales + (o_k + first) // group_size * stride_group
        stored = stored + (load_stored(p_scales, p_biases, o_group, None, layout),)  # noqa: RUF005
    return stored


@triton.jit
def unit_products(
    words,  # units' words, tuple of (1, U)
    inputs,  # their inputs, tuple of (1, U)
    stored,  # `unit_scales`
    bits: tl.constexpr,
    group_size: tl.constexpr,
    mode: tl.constexpr,
    layout: tl.constexpr,
    native: tl.constexpr,
):
    """fp32 (1, U): each unit's part of the product, scales and biases applied. native: `dot2_type`'s."""
    part: tl.constexpr = min(group_size, 32)
    products = tl.zeros_like(words[0]).to(tl.float32)
    if mode == "mxfp8" or native == "" or native == "ptx" or inputs[0].dtype == tl.float32:
        if mode == "affine" and bits == 4 and inputs[0].dtype != tl.float32:
            scales, biases = scale_values(stored[0], layout)
            dot, total = nibble_dot(words, inputs, native)
            return scales * dot + biases * total
        else:
            for first in tl.static_range(0, 32, part):
                scales, biases = scale_values(stored[first // part], layout)
                dot, total = part_dot(words, inputs, first, part, bits, mode, native)
                products = products + scales * dot + biases * total
            return products
    else:
        scaled: tl.constexpr = native == "float16_wait" and inputs[0].dtype == tl.bfloat16
        dtype: tl.constexpr = "bfloat16" if inputs[0].dtype == tl.bfloat16 and not scaled else "float16"
        if scaled:
            inputs, power = as_float16(inputs)
        pairs = pair_inputs(inputs, bits)
        if mode == "affine":
            scales, biases = scale_values(stored[0], layout)
            total, offset = pair_sums(pairs, bits, dtype, native)
            products = scales * unit_dot(words, pairs, offset, bits, dtype, native) + biases * total
        else:
            for first in tl.static_range(0, 32, part):
                scales, _ = scale_values(stored[first // part], layout)
                products += scales * e2m1_dot(words, pairs, first // 8, part // 8, dtype, native)
        return products * power if scaled else products
