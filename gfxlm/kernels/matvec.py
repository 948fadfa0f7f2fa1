"""A few rows times a quantised matrix: a load of a weight serves up to four rows.

A code is never converted to a float. Put into the top of a float's mantissa it makes `u = 1 + code / 2**bits`, so that

    sum(x * code) = 2**bits * (sum(x * u) - sum(x))

in one shift, one and-or and one multiply-add a weight, exact but for fp32's own rounding. Integer-to-float conversion runs
at a fraction of that rate on every GPU.
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
    if shift >= 0:
        words = words << shift
    else:
        words = words >> -shift
    mask: tl.constexpr = ((1 << bits) - 1) << (23 - bits)
    return ((words & mask) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def matvec_kernel(
    p_x,  # (M, K)
    p_w,  # int32 (N, K * bits / 32)
    p_scales,  # (N, K / group_size), strided
    p_biases,
    p_y,  # (M, N)
    M,
    N,
    stride_row,  # of scales and biases, in elements
    stride_group,
    K: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
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
        b_scales = tl.load(p_scales + o_group, mask=m_w, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_W)
        b_biases = tl.load(p_biases + o_group, mask=m_w, other=0.0).to(tl.float32)
        o_x = o_m[:, None, None] * K + (o_w * codes)[None, None, :]
        m_x = (o_m < M)[:, None, None] & (o_w < n_words)[None, None, :]
        b_dot = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_W], tl.float32)
        b_sum = tl.zeros([BLOCK_M, 1, BLOCK_W], tl.float32)
        for i in tl.static_range(codes):
            b_x = tl.load(p_x + o_x + i, mask=m_x, other=0.0).to(tl.float32)
            b_dot += _unit(b_w, i, bits)[None] * b_x
            b_sum += b_x
        acc += b_scales[None] * ((b_dot - b_sum) * (1 << bits)) + b_biases[None] * b_sum
    b_y = tl.sum(acc, 2)  # (BLOCK_M, BLOCK_N)
    o_y = o_m[:, None].to(tl.int64) * N + o_n[None, :]
    m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@dataclass(frozen=True, slots=True)
class MatvecConfig:
    """Everything about a launch that is compiled in: what the launcher runs, and what the code checks look at."""

    constants: dict[str, int]
    num_warps: int

    @classmethod
    def of(cls, rows: int, columns: int, bits: int, group_size: int) -> "MatvecConfig":
        """The configuration for x (rows, columns)."""
        # More rows of x at a time do not fit into registers; the matrix then comes from the cache once more.
        block_m = min(triton.next_power_of_2(rows), 4)
        words = triton.next_power_of_2(columns * bits // 32)
        constants = {
            "K": columns,
            "bits": bits,
            "group_size": group_size,
            "BLOCK_M": block_m,
            # 16 words a thread for one row of x, in loads of 16 bytes; fewer where x has more rows.
            "BLOCK_N": max(1, 4 // block_m),
            "BLOCK_W": min(words, 256),
        }
        return cls(constants, num_warps=2)


def matvec(x: Tensor, w: Tensor, scales: Tensor, biases: Tensor, group_size: int, bits: int) -> Tensor:
    """`x @ w.T` for x (M, K) with M <= 8 and an affine w: packed uint32 (N, K * bits / 32), bits 2, 4 or 8.

    scales and biases (N, K / group_size) share their strides, so that they may lie interleaved. Accumulates in fp32.
    """
    rows, columns = x.shape
    n = w.shape[0]
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    config = MatvecConfig.of(rows, columns, bits, group_size)
    grid = (triton.cdiv(n, config.constants["BLOCK_N"]), triton.cdiv(rows, config.constants["BLOCK_M"]))
    matvec_kernel[grid](
        x.contiguous(),
        w.view(torch.int32),
        scales,
        biases,
        y,
        rows,
        n,
        *scales.stride(),
        **config.constants,
        num_warps=config.num_warps,
    )
    return y
