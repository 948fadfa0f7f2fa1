"""A few rows times a quantised matrix: a load of a weight serves up to four rows.

A code is never converted to a float. Put into the top of a float's mantissa it makes `u = 1 + code / 2**bits`, so that

    sum(x * code) = 2**bits * (sum(x * u) - sum(x))

in one shift, one and-or and one multiply-add a weight, exact but for fp32's own rounding. Integer-to-float conversion
runs at a fraction of that rate on every GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 8
BITS = (2, 4, 8)


@triton.jit
def _unit(words, code: tl.constexpr, bits: tl.constexpr):
    """1 + code / 2**bits as fp32, for the code of that number in each 32-bit word."""
    shift: tl.constexpr = 23 - bits - bits * code
    words = words << shift if shift >= 0 else words >> -shift
    mask: tl.constexpr = ((1 << bits) - 1) << (23 - bits)
    return ((words & mask) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _load_pair(p_scales, p_biases, offsets, mask, interleaved: tl.constexpr):
    """Scales and biases as fp32: from two tensors, or from 32-bit words that hold a pair of the type named."""
    if interleaved == "no":
        scales = tl.load(p_scales + offsets, mask=mask, other=0.0).to(tl.float32)
        biases = tl.load(p_biases + offsets, mask=mask, other=0.0).to(tl.float32)
        return scales, biases
    pair = tl.load(p_scales + offsets, mask=mask, other=0)
    if interleaved == "bfloat16":
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _halves(x, n: tl.constexpr):
    """Even and odd neighbours of (M, 2 n): (M, n) each."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], n, 2]))
    return even, odd


@triton.jit
def _deal_4(x, n: tl.constexpr):
    even, odd = _halves(x, 2 * n)
    x0, x2 = _halves(even, n)
    x1, x3 = _halves(odd, n)
    return x0, x1, x2, x3


@triton.jit
def _deal_8(x, n: tl.constexpr):
    even, odd = _halves(x, 4 * n)
    x0, x2, x4, x6 = _deal_4(even, n)
    x1, x3, x5, x7 = _deal_4(odd, n)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _deal_16(x, n: tl.constexpr):
    even, odd = _halves(x, 8 * n)
    x0, x2, x4, x6, x8, x10, x12, x14 = _deal_8(even, n)
    x1, x3, x5, x7, x9, x11, x13, x15 = _deal_8(odd, n)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def _deal(x, n: tl.constexpr, codes: tl.constexpr):
    """Rows of n words' inputs (M, n * codes), dealt into a tuple of (M, n), one for each code's place in its word."""
    if codes == 4:
        return _deal_4(x, n)
    elif codes == 8:
        return _deal_8(x, n)
    else:
        return _deal_16(x, n)


@triton.jit
def matvec_kernel(
    p_x,  # (M, K)
    p_w,  # int32 (N, K * bits / 32)
    p_scales,  # (N, K / group_size), strided; interleaved: int32, a scale and its bias in one
    p_biases,
    p_y,  # (M, N)
    M,
    N,
    stride_row,  # of scales and biases, in elements
    stride_group,
    K: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    interleaved: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """BLOCK_M rows of x times BLOCK_N rows of w, BLOCK_W words of each at a time."""
    codes: tl.constexpr = 32 // bits
    n_words: tl.constexpr = K // codes
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = (o_n < N)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_W], tl.float32)
    for start in range(0, n_words, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)
        m_w = m_n & (o_w < n_words)[None, :]
        b_w = tl.load(p_w + o_n[:, None] * n_words + o_w[None, :], mask=m_w, other=0, eviction_policy="evict_first")
        o_group = o_n[:, None] * stride_row + (o_w * codes // group_size)[None, :] * stride_group
        b_scales, b_biases = _load_pair(p_scales, p_biases, o_group, m_w, interleaved)  # (BLOCK_N, BLOCK_W)
        # Loaded as they lie, in wide loads, and dealt out in registers.
        o_k = start * codes + tl.arange(0, BLOCK_W * codes)
        m_x = (o_m < M)[:, None] & (o_k < K)[None, :]
        b_x = _deal(tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m_x, other=0.0), BLOCK_W, codes)
        b_dot = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_W], tl.float32)
        b_sum = tl.zeros([BLOCK_M, 1, BLOCK_W], tl.float32)
        for i in tl.static_range(codes):
            b_xi = b_x[i].to(tl.float32)[:, None, :]
            b_dot += _unit(b_w, i, bits)[None] * b_xi
            b_sum += b_xi
        acc += b_scales[None] * ((b_dot - b_sum) * (1 << bits)) + b_biases[None] * b_sum
    b_y = tl.sum(acc, 2)  # (BLOCK_M, BLOCK_N)
    o_y = o_m[:, None].to(tl.int64) * N + o_n[None, :]
    m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@dataclass(frozen=True, slots=True)
class MatvecConfig:
    """Everything about a launch that is compiled in: what the launcher runs, and what the code checks look at."""

    constants: dict[str, int | str]
    grid: tuple[int, int]
    num_warps: int

    @classmethod
    def of(cls, shape: tuple[int, int, int], bits: int, group_size: int, interleaved: str) -> "MatvecConfig":
        """The configuration for (M, N, K). `interleaved` names the type of interleaved pairs, or is "no"."""
        rows, n, columns = shape
        # More rows of x at a time do not fit into registers; the matrix then comes from the cache once more.
        block_m = min(triton.next_power_of_2(rows), 4)
        block_n = max(1, 4 // block_m)
        constants = {
            "K": columns,
            "bits": bits,
            "group_size": group_size,
            "interleaved": interleaved,
            "BLOCK_M": block_m,
            # 16 words a thread for one row of x, in loads of 16 bytes; fewer where x has more rows.
            "BLOCK_N": block_n,
            "BLOCK_W": min(triton.next_power_of_2(columns * bits // 32), 256),
        }
        return cls(constants, (triton.cdiv(n, block_n), triton.cdiv(rows, block_m)), num_warps=2)


def matvec(x: Tensor, w: Tensor, scales: Tensor, biases: Tensor, group_size: int, bits: int) -> Tensor:
    """`x @ w.T` for x (M, K) with M <= 8 and an affine w: packed uint32 (N, K * bits / 32), bits 2, 4 or 8.

    scales and biases (N, K / group_size) share their strides; lying interleaved, a pair of half floats is one load.
    Accumulates in fp32.
    """
    shape = (x.shape[0], w.shape[0], x.shape[1])
    y = torch.empty(shape[:2], dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    pairs = _pairs(scales, biases)
    interleaved = "no" if pairs is None else str(scales.dtype).removeprefix("torch.")
    first = scales if pairs is None else pairs
    config = MatvecConfig.of(shape, bits, group_size, interleaved)
    matvec_kernel[config.grid](
        x.contiguous(),
        w.view(torch.int32),
        first,
        biases,
        y,
        *shape[:2],
        *first.stride(),
        **config.constants,
        num_warps=config.num_warps,
    )
    return y


def _pairs(scales: Tensor, biases: Tensor) -> Tensor | None:
    """int32 (N, K / group_size) of a half-precision scale and its bias each, where they lie side by side."""
    n, groups = scales.shape
    size = scales.element_size()
    apart = biases.data_ptr() - scales.data_ptr()
    if size != 2 or apart != size or not scales.stride() == biases.stride() == (2 * groups, 2):
        return None
    return scales.as_strided((n, 2 * groups), (2 * groups, 1)).view(torch.int32)
