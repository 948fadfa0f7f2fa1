"""The few instructions that no compiler emits by itself, each with its twin in plain Triton.

The twin gives the same numbers but for the order of fp32 sums. It serves the interpreter and every other target.
"""

import triton
import triton.language as tl

from gfxlm.device.arch import Architecture


def dot2_type(arch: Architecture, dtype: str) -> str:
    """What `dot2` is to multiply natively for inputs of `dtype`: a type of pairs; "ptx" or "" where there is none.

    CDNA before gfx950 has it for float16 alone, and there nothing may read the sum in the next three cycles.
    """
    if arch.family in ("gfx11", "gfx12") or arch.name == "gfx950":
        return dtype if dtype in ("bfloat16", "float16") else ""
    if arch.vendor == "nvidia":
        return "ptx"
    return "float16_wait" if arch.family == "gfx9" and dtype in ("bfloat16", "float16") else ""


@triton.jit
def split_pair(pair, dtype: tl.constexpr):
    """The low and the high half-precision number of int32 words, as fp32. Any dtype but "bfloat16" is float16."""
    if dtype == "bfloat16":
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = pair.to(tl.int16).to(tl.float16, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def join_pair(low, high):
    """int32 words of two 16-bit tensors' bits."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def dot2(a, b, acc, dtype: tl.constexpr, native: tl.constexpr):
    """acc + a.low * b.low + a.high * b.high, for int32 words that are pairs of `dtype`; fp32.

    native: `dot2_type`'s, or "twin".
    """
    if native == "bfloat16":
        return tl.inline_asm_elementwise(
            "v_dot2_f32_bf16 $0, $1, $2, $3", "=v,v,v,v", [a, b, acc], dtype=tl.float32, is_pure=True, pack=1
        )
    elif native == "float16":
        return tl.inline_asm_elementwise(
            "v_dot2_f32_f16 $0, $1, $2, $3", "=v,v,v,v", [a, b, acc], dtype=tl.float32, is_pure=True, pack=1
        )
    elif native == "float16_wait":
        return tl.inline_asm_elementwise(
            "v_dot2_f32_f16 $0, $1, $2, $3\ns_nop 2", "=v,v,v,v", [a, b, acc], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        a_low, a_high = split_pair(a, dtype)
        b_low, b_high = split_pair(b, dtype)
        return acc + a_low * b_low + a_high * b_high


@triton.jit
def look_up(indices, low: tl.constexpr, high: tl.constexpr, native: tl.constexpr):
    """A table's bytes, by the bytes of int32 words: 0 to 3 are `low`'s, the lowest first, 4 to 7 `high`'s."""
    if native != "twin":
        low_word, high_word = tl.full(indices.shape, low, tl.int32), tl.full(indices.shape, high, tl.int32)
        return byte_permute(high_word, low_word, indices)
    else:
        found = tl.zeros_like(indices)
        for i in tl.static_range(4):
            index = (indices >> (8 * i)) & 7
            entries = tl.where(index < 4, low, high)
            found |= ((entries >> (index % 4 * 8)) & 255) << (8 * i)
        return found


@triton.jit
def byte_permute(high, low, indices):
    """AMD's v_perm_b32: bytes 0 to 3 are those of int32 `low`, 4 to 7 of `high`."""
    return tl.inline_asm_elementwise(
        "v_perm_b32 $0, $1, $2, $3", "=v,v,v,v", [high, low, indices], dtype=tl.int32, is_pure=True, pack=1
    )


_MASKS = (0xF000, 0xF0000, *(((1 << bits) - 1) << (23 - bits) for bits in range(1, 9)))
_UNIT = tl.constexpr({mask: f"lop3.b32 $0, $1, {mask:#x}, 0x3F800000, 0xEA;" for mask in _MASKS})


@triton.jit
def mantissa(words, mask: tl.constexpr, native: tl.constexpr):
    """fp32 of 1 and, below it, what int32 words have under a mask of neighbouring bits below bit 23."""
    if native == "ptx":  # of two constants the compiler makes two instructions
        text: tl.constexpr = _UNIT[mask]
        return tl.inline_asm_elementwise(text, "=r,r", [words], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return ((words & mask) | 0x3F800000).to(tl.float32, bitcast=True)


def _exact_code(shift: int, mask: int, magic: int) -> str:
    word = f".reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 $0, t" if shift else "lop3.b32 $0, $1"
    return f"{{ {word}, {mask * 0x10001:#x}, {magic * 0x10001:#x}, 0xEA; }}"  # (word & mask) | magic


_EXACT = {
    name: tl.constexpr({(s << 8) | m: _exact_code(s, m, magic) for m in (3, 15, 255) for s in range(0, 15, 2)})
    for name, magic in (("bfloat16", 0x4300), ("float16", 0x6400))
}
_EXACT_BFLOAT16, _EXACT_FLOAT16 = _EXACT["bfloat16"], _EXACT["float16"]


@triton.jit
def exact_code(halves, shift: tl.constexpr, mask: tl.constexpr, dtype: tl.constexpr, native: tl.constexpr):
    """128 + code as "bfloat16", up to 7 bits, or 1024 + code as "float16": of int16, shifted right and masked.

    `native` is for NVIDIA, two neighbours at a time.
    """
    if native and dtype == "bfloat16":
        text: tl.constexpr = _EXACT_BFLOAT16[(shift << 8) | mask]
        return tl.inline_asm_elementwise(text, "=r,r", [halves], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif native:
        text: tl.constexpr = _EXACT_FLOAT16[(shift << 8) | mask]
        return tl.inline_asm_elementwise(text, "=r,r", [halves], dtype=tl.float16, is_pure=True, pack=2)
    elif dtype == "bfloat16":
        return (((halves >> shift) & mask) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return (((halves >> shift) & mask) | 0x6400).to(tl.float16, bitcast=True)
