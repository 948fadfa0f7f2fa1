"""Narrowing down the logit from which upwards top-k, top-p and min-p keep tokens.

Each of these filters keeps all tokens from some logit upwards, so that together they are one threshold: the largest t
that `reached` holds for. Tokens are counted, and their probability added up, from LEVELS logits upwards at once; the
threshold then lies between two of them. Probabilities are added as integers, which gives one sum in whatever order.
"""

import triton
import triton.language as tl

from gfxlm.kernels.basic.keys import NOTHING
from gfxlm.kernels.early import after_the_last, before_the_next

UNIT = tl.constexpr(2.0**40)  # probability one, as an integer
INF = tl.constexpr(float("inf"))
ROW = tl.constexpr(6)  # fp32 numbers kept of a row: maximum, sum of exp(x - maximum), low and high of two looks


@triton.jit
def asked_of(p_fp32, p_int64, slot, fp32_row, int64_row, top, total):
    """What a slot's filters ask: probability (times total), tokens, a logit, and tokens above that. Greedy: nothing."""
    drawn = tl.load(p_fp32 + slot * fp32_row) > 0
    mass = tl.where(drawn, tl.load(p_fp32 + slot * fp32_row + 1) * total, INF)
    floor = tl.where(drawn, top + tl.load(p_fp32 + slot * fp32_row + 2), -INF)
    top_k = tl.where(drawn, tl.load(p_int64 + slot * int64_row + 1), 1 << 31)
    least = tl.load(p_int64 + slot * int64_row + 2)
    return mass, top_k, floor, least


@triton.jit
def reached(t, mass, count, asked):
    """Whether the tokens from t upwards, of that probability and number, satisfy a filter."""
    return (mass.to(tl.float32) / UNIT >= asked[0]) | (count >= asked[1]) | ((t <= asked[2]) & (count >= asked[3]))


@triton.jit
def _levels(low, high, LEVELS: tl.constexpr):
    """LEVELS logits from low to high. A fused multiply-add, so that all kernels mean the same ones."""
    o_level = tl.arange(0, LEVELS)
    steps = o_level.to(tl.float32) * (1.0 / (LEVELS - 1))
    t = tl.fma(steps, tl.zeros_like(steps) + (high - low), tl.zeros_like(steps) + low)
    return tl.where(o_level == LEVELS - 1, high, t)


@triton.jit
def narrowed(p_sums, low, high, asked, LEVELS: tl.constexpr):
    """Between which levels the threshold lies, low <= threshold < high, and the mass and count from high upwards.

    If the highest level, the row's maximum, is not above it, high is inf. If no level satisfies a filter, nothing is
    dropped: high is -inf.
    """
    o_level = tl.arange(0, LEVELS)
    t = _levels(low, high, LEVELS)
    mass = tl.load(p_sums + o_level)
    count = tl.load(p_sums + LEVELS + o_level)
    i_low = tl.max(tl.where(reached(t, mass, count, asked), o_level, -1), 0)
    above = (o_level == i_low + 1) & (i_low >= 0)
    low = tl.where(i_low < 0, INF, tl.max(tl.where(o_level == i_low, t, -INF), 0))
    high = tl.where(i_low == LEVELS - 1, INF, tl.max(tl.where(above, t, -INF), 0))
    return low, high, tl.sum(tl.where(above, mass, 0), 0), tl.sum(tl.where(above, count, 0), 0)


@triton.jit
def _first_low(tops, bottoms, m_block, top, total, asked, V, n_blocks):
    """A logit, as high as is easily had, that is not above the threshold if any is."""
    low = tl.min(bottoms, 0)
    # Tokens less likely than (1 - top_p) / V are less than 1 - top_p together.
    rest = 1.0 - asked[0] / total
    low = tl.where(rest > 0, tl.maximum(low, top + tl.log(tl.maximum(rest, 1e-8) * total / V) - 0.01), low)
    # As many tokens as there are blocks are not below the least of the blocks' maxima.
    low = tl.where(asked[1] <= n_blocks, tl.maximum(low, tl.min(tl.where(m_block, tops, INF), 0)), low)
    return tl.where(asked[3] <= 1, tl.maximum(low, asked[2]), low)


@triton.jit
def stats_kernel(
    p_logits,  # (R, V)
    p_stats,  # fp32 (R, 3, n_blocks): maximum, least finite logit, sum of exp(x - maximum)
    p_sums,  # int64 (R, 4 * LEVELS): mass and count from each level upwards, of two looks; set to 0
    p_listed,  # int64 (R, 2): how many tokens are listed, and the best of those kept for sure; reset
    V,
    n_blocks,
    logits_row,
    early: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of BLOCK logits of a row."""
    before_the_next(early)
    after_the_last(early)
    i_block = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)
    tokens = i_block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_logits + i_row * logits_row + tokens, mask=tokens < V, other=-INF).to(tl.float32)
    top = tl.max(tl.where(x == x, x, INF), 0)
    p_stats += i_row * 3 * n_blocks + i_block
    tl.store(p_stats, top)
    tl.store(p_stats + n_blocks, tl.min(tl.where(x > -INF, x, INF), 0))
    tl.store(p_stats + 2 * n_blocks, tl.sum(tl.where(x > -INF, tl.exp(x - top), 0.0), 0))
    if i_block == 0:
        tl.store(p_sums + i_row * 4 * LEVELS + tl.arange(0, 4 * LEVELS), tl.zeros([4 * LEVELS], tl.int64))
        tl.store(p_listed + i_row * 2, 0)
        tl.store(p_listed + i_row * 2 + 1, NOTHING)


@triton.jit
def count_kernel(
    p_logits,
    p_fp32,
    p_int64,
    p_slots,
    p_stats,
    p_row,  # fp32 (R, ROW)
    p_sums,
    V,
    n_blocks,
    logits_row,
    fp32_row,
    int64_row,
    look: tl.constexpr,  # 0 or 1
    early: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCKS: tl.constexpr,  # not less than n_blocks
):
    """Mass and count of BLOCK tokens of a row from each level upwards, added to the row's."""
    before_the_next(early)
    after_the_last(early)
    i_block = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)
    slot = tl.load(p_slots + i_row)
    p_logits += i_row * logits_row + i_block * BLOCK
    o_all = tl.arange(0, BLOCK)
    b_x = tl.load(p_logits + o_all, mask=i_block * BLOCK + o_all < V, other=-INF).to(tl.float32)
    p_stats += i_row * 3 * n_blocks
    p_row += i_row * ROW
    p_sums += i_row * 4 * LEVELS
    if look == 0:
        o_block = tl.arange(0, BLOCKS)
        m_block = o_block < n_blocks
        tops = tl.load(p_stats + o_block, mask=m_block, other=-INF)
        bottoms = tl.load(p_stats + n_blocks + o_block, mask=m_block, other=INF)
        sums = tl.load(p_stats + 2 * n_blocks + o_block, mask=m_block, other=0.0)
        top = tl.max(tops, 0)
        total = tl.sum(tl.where(tops > -INF, sums * tl.exp(tops - top), 0.0), 0)
        asked = asked_of(p_fp32, p_int64, slot, fp32_row, int64_row, top, total)
        low = _first_low(tops, bottoms, m_block, top, total, asked, V, n_blocks)
        high = top
        if i_block == 0:
            tl.store(p_row, top)
            tl.store(p_row + 1, total)
    else:
        top = tl.load(p_row)
        asked = asked_of(p_fp32, p_int64, slot, fp32_row, int64_row, top, tl.load(p_row + 1))
        low, high, _, _ = narrowed(p_sums, tl.load(p_row + 2), tl.load(p_row + 3), asked, LEVELS)
        high = tl.where(low < INF, tl.minimum(high, top), INF)
    if i_block == 0:
        tl.store(p_row + 2 + 2 * look, low)
        tl.store(p_row + 3 + 2 * look, high)
    # This also brings the block into the cache that the loop reads it from.
    if tl.max(b_x, 0) >= low:
        t = _levels(low, high, LEVELS)[:, None]
        b_mass = tl.zeros([LEVELS, STEP], tl.float32)
        b_count = tl.zeros([LEVELS, STEP], tl.int32)
        for start in range(0, BLOCK, STEP):
            o_token = start + tl.arange(0, STEP)
            x = tl.load(p_logits + o_token, mask=i_block * BLOCK + o_token < V, other=-INF).to(tl.float32)
            above = x[None, :] >= t
            b_mass += tl.where(above, tl.exp(x - top)[None, :], 0.0)
            b_count += above.to(tl.int32)
        o_sum = 2 * LEVELS * look + tl.arange(0, LEVELS)
        tl.atomic_add(p_sums + o_sum, (tl.sum(b_mass, 1) * UNIT).to(tl.int64), sem="relaxed")
        tl.atomic_add(p_sums + LEVELS + o_sum, tl.sum(b_count, 1).to(tl.int64), sem="relaxed")
