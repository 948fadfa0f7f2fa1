"""The first largest or smallest number of every row, in two stages where a row is wide."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.basic.keys import FINITE, NOTHING, ordered, pack, packed_index, packed_key
from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config

_BLOCK = 1024  # of the second stage


@triton.jit
def _result(packed, finite: tl.constexpr):
    index = packed_index(packed)
    if finite:
        key = packed_key(packed)
        index = tl.where((key <= FINITE) & (key >= -FINITE - 1), index, -1)
    return index


@triton.jit(do_not_specialize=["n_rows"])
def select_kernel(
    p_x,  # (n_rows, D), any strides
    p_out,  # int64: the packed best (n_rows, blocks), or the index (n_rows,) if one block is all
    n_rows,
    D,
    n_blocks,
    x_row,
    x_column,
    smallest: tl.constexpr,
    finite: tl.constexpr,
    whole: tl.constexpr,
    early: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best of BLOCK columns of ROWS rows."""
    before_the_next(early)
    after_the_last(early)
    i_block = tl.program_id(0) % n_blocks
    o_row = (tl.program_id(0) // n_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = i_block * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < n_rows
    mask = m_row[:, None] & (o_d < D)[None, :]
    o_x = o_row[:, None] * x_row + o_d[None, :].to(tl.int64) * x_column
    keys = ordered(tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32))
    if smallest:
        keys = tl.where(keys == 0x7FFFFFFF, keys, ~keys)
    best = tl.max(tl.where(mask, pack(keys, o_d[None, :]), NOTHING), 1)  # (ROWS,)
    if whole:
        tl.store(p_out + o_row, _result(best, finite), mask=m_row)
    else:
        tl.store(p_out + o_row * n_blocks + i_block, best, mask=m_row)


@triton.jit
def best_kernel(p_packed, p_out, n_blocks, finite: tl.constexpr, early: tl.constexpr, BLOCK: tl.constexpr):
    """The best of a row's blocks: packed int64 (n_rows, n_blocks) to the index, int64 (n_rows,)."""
    before_the_next(early)
    after_the_last(early)
    i_row = tl.program_id(0).to(tl.int64)
    b_best = tl.full([BLOCK], NOTHING, tl.int64)
    for start in range(0, n_blocks, BLOCK):
        o_block = start + tl.arange(0, BLOCK)
        packed = tl.load(p_packed + i_row * n_blocks + o_block, mask=o_block < n_blocks, other=NOTHING)
        b_best = tl.maximum(b_best, packed)
    tl.store(p_out + i_row, _result(tl.max(b_best, 0), finite))


def select(x: Tensor, *, smallest: bool = False, finite: bool = False) -> Tensor:
    """The index, int64 (n_rows,), of each row's first largest or smallest number; NaN wins either.

    x is (n_rows, D) of bf16, fp16 or fp32 and any strides, 0 < D < 2**31. With `finite`, -1 where the best is not.
    """
    n_rows, columns = x.shape
    out = torch.empty(n_rows, dtype=torch.int64, device=x.device)
    if n_rows == 0:
        return out
    tuned = config("select", x.device, columns=columns, rows=n_rows)
    block = min(next_power_of_2(columns), tuned["BLOCK"])
    n_blocks = cdiv(columns, block)
    best = out if n_blocks == 1 else torch.empty(n_rows, n_blocks, dtype=torch.int64, device=x.device)
    launch(
        select_kernel,
        (n_blocks * cdiv(n_rows, tuned["ROWS"]),),
        x,
        best,
        n_rows,
        columns,
        n_blocks,
        *x.stride(),
        options={"num_warps": tuned["num_warps"]},
        smallest=smallest,
        finite=finite,
        whole=n_blocks == 1,
        ROWS=tuned["ROWS"],
        BLOCK=block,
    )
    if n_blocks > 1:
        second = min(next_power_of_2(n_blocks), _BLOCK)
        launch(best_kernel, (n_rows,), best, out, n_blocks, options={"num_warps": 4}, finite=finite, BLOCK=second)
    return out
