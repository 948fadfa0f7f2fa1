"""Many rows times a quantised matrix, on matrix units: fused, or dequantised first and left to BLAS."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.layout import adjacent
from gfxlm.kernels.linear.deal import deal, tile_sums
from gfxlm.kernels.linear.dense import product
from gfxlm.kernels.linear.dequantize import dequantize
from gfxlm.kernels.linear.parts import add_parts
from gfxlm.kernels.linear.planes import format_of, operands, tile_dot, tile_periods, unpacking
from gfxlm.kernels.packed import Packed
from gfxlm.kernels.sizes import cdiv
from gfxlm.kernels.tuning import Fact, config


@triton.jit(do_not_specialize=["M"])
def wide_kernel(
    p_x,  # (M, K), dealt into planes
    p_sums,  # fp32 (M, K / (BLOCK_W * PERIOD)), for UNPACK "sums"
    p_w,  # int16 (N, K * BITS / 16)
    p_scales,  # (N, K / GROUP), strided
    p_biases,
    p_bias,  # (N,) or None
    p_residual,  # (M, N) or None
    p_y,  # (M, N), or fp32 (SPLITS, M, N)
    M,
    N,
    stride_w,
    stride_scale,
    stride_group,
    stride_residual,
    K: tl.constexpr,
    BITS: tl.constexpr,
    PERIOD: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    SCALES: tl.constexpr,
    UNPACK: tl.constexpr,
    early: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """BLOCK_N columns of BLOCK_M rows of y, or what one share of K gives. Neighbouring programs share the rows of w."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    first_n = (tl.program_id(0) // m_blocks).to(tl.int64) * BLOCK_N
    first_m = (tl.program_id(0) % m_blocks).to(tl.int64) * BLOCK_M
    split = tl.program_id(1) if SPLITS > 1 else 0
    after_the_last(early)
    # Rows of w past the end repeat the last one, and are not stored: no mask in the loop.
    o_n = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_n).to(tl.int32))
    o_m = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = tile_dot(
        acc,
        p_w + first_n * stride_w,
        p_scales + first_n * stride_scale,
        p_biases + first_n * stride_scale,
        o_n * stride_w,
        o_n * stride_scale,
        stride_group,
        p_x + first_m * K + o_m * K,
        p_sums + (first_m + o_m) * (K // PERIOD // BLOCK_W),
        first_m + o_m < M,
        split,
        K,
        BITS,
        PERIOD,
        GROUP,
        MODE,
        SCALES,
        UNPACK,
        BLOCK_W,
        SPLITS,
    )
    before_the_next(early)
    o_n = first_n + tl.arange(0, BLOCK_N)[:, None]
    o_m = first_m + tl.arange(0, BLOCK_M)[None, :]
    m_y = (o_n < N) & (o_m < M)
    # Addresses are kept in range, which takes fewer registers than masks.
    near_n, near_m = tl.minimum(o_n, N - 1), tl.minimum(o_m, M - 1)
    if p_bias is not None:
        acc += tl.load(p_bias + near_n).to(tl.float32)
    if p_residual is not None:
        acc += tl.load(p_residual + near_m * stride_residual + near_n).to(tl.float32)
    if SPLITS > 1:
        p_y += tl.program_id(1).to(tl.int64) * M * N
    tl.store(p_y + o_m * N + o_n, acc.to(p_y.dtype.element_ty), mask=m_y)


def wide(x: Tensor, packed: Packed, *, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`x @ w.T + bias + residual` for x (M, K) and a quantised w (N, K), bias (N,) and residual (M, N).

    The weight is rounded to x's dtype, products accumulate in fp32. What is added is rounded with the result where the
    kernel is fused, and otherwise as BLAS does: the bias in fp32, the residual after the product is rounded.
    """
    _check(x, packed, bias, residual)
    if x.numel() == 0:
        return x.new_empty((x.shape[0], packed.rows))
    facts: dict[str, Fact] = {
        "m": x.shape[0],
        "n": packed.rows,
        "k": packed.columns,
        "bits": packed.bits,
        "mode": packed.mode,
        "itemsize": x.itemsize,
    }
    tuned = config("wide", x.device, **facts)
    if tuned.pop("method") == "fused":
        return fused(x, packed, tuned, bias=bias, residual=residual)
    return by_blas(x, packed, tuned["rows"], bias=bias, residual=residual)


def by_blas(
    x: Tensor, packed: Packed, chunk: int, *, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """`wide` through BLAS, about `chunk` rows of w at a time: what is written is still cached, and small."""
    y = torch.empty((x.shape[0], packed.rows), dtype=x.dtype, device=x.device)
    chunks = cdiv(packed.rows, chunk)
    step = cdiv(packed.rows, chunks * 128) * 128  # equal parts, aligned as BLAS likes it
    for start in range(0, packed.rows, step):
        part = slice(start, start + step)
        added = None if bias is None else bias[part]
        product(x, dequantize(packed.at(part), x.dtype), bias=added, out=y[:, part])
    return y if residual is None else y.add_(residual)


def fused(
    x: Tensor, packed: Packed, tuned: dict[str, Any], *, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """`wide` by one kernel over planes of x, and one more that adds up where programs share K.

    `tuned` holds unpack, block_n, block_m, block_k, the compiler's options, and into how many `splits` K goes.
    """
    options = dict(tuned)
    block_n, block_m, block_k, splits = (options.pop(name) for name in ("block_n", "block_m", "block_k", "splits"))
    unpack = unpacking(options.pop("unpack"), x, packed)
    constants = format_of(packed)
    rows, n = x.shape[0], packed.rows
    residual = None if residual is None else adjacent(residual)
    words, scales, biases = operands(packed)
    period, block_w = int(constants["PERIOD"]), tile_periods(block_k, packed, unpack)
    dealt = deal(x, period)
    tiles = cdiv(x.shape[1], period * block_w)
    splits = cdiv(tiles, cdiv(tiles, splits))  # as many as have work
    whole = splits == 1
    y = torch.empty((splits, rows, n), dtype=x.dtype if whole else torch.float32, device=x.device)
    launch(
        wide_kernel,
        (cdiv(rows, block_m) * cdiv(n, block_n), splits),
        dealt,
        tile_sums(dealt, period, block_w * period) if unpack == "sums" else dealt,
        words,
        scales,
        biases,
        bias if whole else None,
        residual if whole else None,
        y,
        rows,
        n,
        words.stride(0),
        *scales.stride(),
        0 if residual is None else residual.stride(0),
        K=x.shape[1],
        **constants,
        UNPACK=unpack,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_W=block_w,
        SPLITS=splits,
        options=options,
    )
    return y[0] if whole else add_parts(y, x.dtype, bias=bias, residual=residual)


def _check(x: Tensor, packed: Packed, bias: Tensor | None, residual: Tensor | None) -> None:
    n, k = packed.rows, packed.columns
    if packed.words.ndim != 2:
        raise ValueError(f"packed: must be one matrix, got words {tuple(packed.words.shape)}")
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x: must be (M, {k}) for a weight ({n}, {k}), got {tuple(x.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: must be ({n},), got {tuple(bias.shape)}")
    if residual is not None and residual.shape != (x.shape[0], n):
        raise ValueError(f"residual: must be ({x.shape[0]}, {n}), got {tuple(residual.shape)}")
