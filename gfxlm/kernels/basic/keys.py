"""Floats as integers in the same order, alone and packed with an index, so that an integer maximum finds the first."""

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """fp32 as int32 keys: -0.0 equals 0.0, and NaN is above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, keys, 0x7FFFFFFF)


@triton.jit
def unordered(keys):
    """The fp32 of each int32 key."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(keys, indices):
    """int64 whose maximum is the largest key's, and among equals that of the smallest index."""
    return (keys.to(tl.int64) << 32) | (0x7FFFFFFF - indices).to(tl.int64)


@triton.jit
def packed_key(packed):
    """The key in each `pack`, int32."""
    return (packed >> 32).to(tl.int32)


@triton.jit
def packed_index(packed):
    """The index in each `pack`, int64."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)


NOTHING = tl.constexpr(-(1 << 63))  # below every `pack`
FINITE = tl.constexpr(0x7F7FFFFF)  # the key of the largest finite float; its negative less one is the least's
