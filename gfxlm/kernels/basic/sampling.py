"""A draw from every row's softmax by the Gumbel-max trick, in one look at the logits.

Requests' wishes lie in two tables with a row for every slot: fp32 (temperature, top_p, log_min_p, ...) and int64
(seed, top_k, min_tokens_to_keep, ...).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.basic.keys import NOTHING, ordered, pack, packed_index
from gfxlm.kernels.basic.random import gumbel, splitmix64
from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config


@triton.jit
def scores(x, top, temperature, stream, tokens):
    """What a token is drawn by, the largest winning: fp32. A temperature of 0 is greedy."""
    b_score = x - top
    if temperature > 0:
        b_score = b_score / temperature + gumbel(stream, tokens)
    return b_score


@triton.jit
def draw_kernel(
    p_logits,  # (R, V)
    p_fp32,
    p_int64,
    p_slots,  # int64 (R,)
    p_positions,  # int64 (R,)
    p_best,  # fp32 (R, 2, n_blocks): each block's largest logit, and the score of its winner relative to that
    p_winner,  # int32 (R, n_blocks)
    V,
    n_blocks,
    logits_row,
    fp32_row,
    int64_row,
    early: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The winner among BLOCK tokens of a row."""
    before_the_next(early)
    after_the_last(early)
    i_block = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)
    slot = tl.load(p_slots + i_row)
    temperature = tl.load(p_fp32 + slot * fp32_row)
    stream = splitmix64(tl.load(p_int64 + slot * int64_row), tl.load(p_positions + i_row))
    tokens = i_block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_logits + i_row * logits_row + tokens, mask=tokens < V, other=float("-inf")).to(tl.float32)
    # A NaN anywhere must be seen in the maximum.
    top = tl.max(tl.where(x == x, x, float("inf")), 0)
    # Relative to the block's own maximum, because a small temperature magnifies rounding.
    b_score = scores(x, tl.where(top == float("-inf"), 0.0, top), temperature, stream, tokens)
    winner = packed_index(tl.max(pack(ordered(b_score), tokens), 0)).to(tl.int32)
    tl.store(p_best + i_row * 2 * n_blocks + i_block, top)
    tl.store(p_best + (i_row * 2 + 1) * n_blocks + i_block, tl.max(b_score, 0))
    tl.store(p_winner + i_row * n_blocks + i_block, winner)


@triton.jit
def draw_best_kernel(
    p_fp32,
    p_slots,
    p_best,
    p_winner,
    p_out,  # int64 (R,)
    n_blocks,
    fp32_row,
    early: tl.constexpr,
    BLOCK: tl.constexpr,  # not less than n_blocks
):
    """The winner among a row's blocks, -1 where the largest logit is not finite."""
    before_the_next(early)
    after_the_last(early)
    i_row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(p_fp32 + tl.load(p_slots + i_row) * fp32_row)
    o_block = tl.arange(0, BLOCK)
    m_block = o_block < n_blocks
    p_best += i_row * 2 * n_blocks + o_block
    tops = tl.load(p_best, mask=m_block, other=float("-inf"))
    b_score = tl.load(p_best + n_blocks, mask=m_block, other=float("-inf"))
    winners = tl.load(p_winner + i_row * n_blocks + o_block, mask=m_block, other=0)
    top = tl.max(tops, 0)
    b_score += (tops - top) / tl.where(temperature > 0, temperature, 1.0)
    token = packed_index(tl.max(tl.where(m_block, pack(ordered(b_score), winners), NOTHING), 0))
    tl.store(p_out + i_row, tl.where(tl.abs(top) < float("inf"), token, -1))


def draw(logits: Tensor, fp32: Tensor, int64: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """One token a row, int64 (R,), by its slot's temperature and seed; -1 where the largest logit is not finite.

    logits are (R, V) of bf16, fp16 or fp32, V adjacent; slots and positions int64 (R,). The noise of a token depends
    on (seed, position, token) alone.
    """
    n_rows, vocab = logits.shape
    out = torch.empty(n_rows, dtype=torch.int64, device=logits.device)
    if n_rows == 0:
        return out
    tuned = config("draw", logits.device, columns=vocab, rows=n_rows)
    n_blocks = cdiv(vocab, tuned["BLOCK"])
    best = torch.empty(n_rows, 2, n_blocks, device=logits.device)
    winner = torch.empty(n_rows, n_blocks, dtype=torch.int32, device=logits.device)
    launch(
        draw_kernel,
        (n_blocks, n_rows),
        logits,
        fp32,
        int64,
        slots,
        positions,
        best,
        winner,
        vocab,
        n_blocks,
        logits.stride(0),
        fp32.stride(0),
        int64.stride(0),
        options={"num_warps": tuned["num_warps"]},
        BLOCK=tuned["BLOCK"],
    )
    launch(
        draw_best_kernel,
        (n_rows,),
        fp32,
        slots,
        best,
        winner,
        out,
        n_blocks,
        fp32.stride(0),
        options={"num_warps": 4},
        BLOCK=next_power_of_2(n_blocks),
    )
    return out
