"""x as `planes` wants it: each row dealt into planes, and the sums of its tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.layout import adjacent
from gfxlm.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def sums_kernel(p_x, p_sums, K: tl.constexpr, PERIOD: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of BLOCK tiles of TILE columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    o_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    run: tl.constexpr = TILE // PERIOD  # of a tile's columns, within a plane
    o_k = tl.arange(0, TILE)
    o_x = o_k // run * (K // PERIOD) + o_k % run
    mask = o_t < K // TILE
    b_x = tl.load(p_x + row * K + o_t[:, None] * run + o_x[None, :], mask=mask[:, None], other=0)
    tl.store(p_sums + row * (K // TILE) + o_t, tl.sum(b_x.to(tl.float32), 1), mask=mask)


def tile_sums(dealt: Tensor, period: int, tile: int) -> Tensor:
    """fp32 (M, K / tile): the sum of each `tile` columns of x, dealt into planes (M, K)."""
    rows, columns = dealt.shape
    tiles = columns // tile
    sums = torch.empty((rows, tiles), dtype=torch.float32, device=dealt.device)
    block = min(2048 // tile, next_power_of_2(tiles))
    constants = {"K": columns, "PERIOD": period, "TILE": tile, "BLOCK": block}
    launch(sums_kernel, (rows, cdiv(tiles, block)), dealt, sums, **constants, options={"num_warps": 4})
    return sums


@triton.jit
def deal_kernel(p_x, p_y, stride_x, K: tl.constexpr, PERIOD: tl.constexpr, early: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK periods of one row, plane by plane."""
    before_the_next(early)
    after_the_last(early)
    row = tl.program_id(0).to(tl.int64)
    o_p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.arange(0, PERIOD)
    mask = (o_p < K // PERIOD)[:, None]
    b_x = tl.load(p_x + row * stride_x + o_p[:, None] * PERIOD + plane[None, :], mask=mask, other=0)
    tl.store(p_y + row * K + plane[None, :] * (K // PERIOD) + o_p[:, None], b_x, mask=mask)


def deal(x: Tensor, period: int) -> Tensor:
    """x (M, K) with each row dealt into planes, (M, period, K / period) in memory; x itself if there is one plane."""
    if period == 1:
        return x.contiguous()
    rows, columns = x.shape
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    x = adjacent(x)
    block = min(1024 // period, next_power_of_2(columns // period))
    grid = (rows, cdiv(columns // period, block))
    launch(deal_kernel, grid, x, y, x.stride(0), K=columns, PERIOD=period, BLOCK=block, options={"num_warps": 4})
    return y
