"""A draw from what top-k, top-p and min-p leave of every row, without sorting it.

After two looks for the threshold (see `threshold`) few tokens are still in doubt: those are listed, and one program
settles them, bit by bit of the threshold.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.basic.keys import NOTHING, ordered, pack, packed_index, unordered
from gfxlm.kernels.basic.random import splitmix64
from gfxlm.kernels.basic.sampling import scores
from gfxlm.kernels.basic.threshold import INF, ROW, UNIT, asked_of, count_kernel, narrowed, reached, stats_kernel
from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config


@triton.jit
def split_kernel(
    p_logits,
    p_fp32,
    p_int64,
    p_slots,
    p_positions,
    p_row,
    p_sums,
    p_listed,
    p_tokens,  # int32 (R, V): tokens in doubt, in no order
    V,
    logits_row,
    fp32_row,
    int64_row,
    early: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of BLOCK tokens of a row, draw one of those that are kept for sure and list those in doubt."""
    before_the_next(early)
    after_the_last(early)
    i_row = tl.program_id(1).to(tl.int64)
    slot = tl.load(p_slots + i_row)
    p_row += i_row * ROW
    top = tl.load(p_row)
    asked = asked_of(p_fp32, p_int64, slot, fp32_row, int64_row, top, tl.load(p_row + 1))
    p_sums += (i_row * 4 + 2) * LEVELS
    low, high, _, _ = narrowed(p_sums, tl.load(p_row + 4), tl.load(p_row + 5), asked, LEVELS)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_logits + i_row * logits_row + tokens, mask=tokens < V, other=-INF).to(tl.float32)
    kept = (x >= high) & (tokens < V)
    p_listed += i_row * 2
    if tl.max(kept.to(tl.int32), 0) > 0:
        stream = splitmix64(tl.load(p_int64 + slot * int64_row), tl.load(p_positions + i_row))
        b_score = scores(x, top, tl.load(p_fp32 + slot * fp32_row), stream, tokens)
        best = tl.max(tl.where(kept, pack(ordered(b_score), tokens), NOTHING), 0)
        tl.atomic_max(p_listed + 1, best, sem="relaxed")
    doubted = ((x >= low) & (x < high)).to(tl.int32)
    n_doubted = tl.sum(doubted, 0)
    if n_doubted > 0:
        place = tl.atomic_add(p_listed, n_doubted.to(tl.int64), sem="relaxed") + tl.cumsum(doubted, 0) - 1
        tl.store(p_tokens + i_row * V + place, tokens, mask=doubted > 0)


@triton.jit
def _listed(p_logits, p_tokens, start, n_listed, BLOCK: tl.constexpr):
    """The logits of BLOCK listed tokens from number `start`, -inf beyond the end."""
    o_listed = start + tl.arange(0, BLOCK)
    tokens = tl.load(p_tokens + o_listed, mask=o_listed < n_listed, other=0)
    return tl.load(p_logits + tokens, mask=o_listed < n_listed, other=-INF).to(tl.float32)


@triton.jit
def _add_pairs(mass_a, count_a, mass_b, count_b):
    return mass_a + mass_b, count_a + count_b


@triton.jit
def _from(x, t, top):
    """Mass and count of the logits from t upwards."""
    b_mass = tl.where(x >= t, (tl.exp(x - top) * UNIT).to(tl.int64), 0)
    return tl.reduce((b_mass, (x >= t).to(tl.int64)), 0, _add_pairs)


@triton.jit
def settle_kernel(
    p_logits,
    p_fp32,
    p_int64,
    p_slots,
    p_positions,
    p_row,
    p_sums,
    p_listed,
    p_tokens,
    p_out,  # int64 (R,)
    V,
    logits_row,
    fp32_row,
    int64_row,
    early: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find a row's threshold among the tokens in doubt, and draw from those that it keeps and those kept for sure."""
    before_the_next(early)
    after_the_last(early)
    i_row = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i_row)
    p_row += i_row * ROW
    top = tl.load(p_row)
    asked = asked_of(p_fp32, p_int64, slot, fp32_row, int64_row, top, tl.load(p_row + 1))
    p_sums += (i_row * 4 + 2) * LEVELS
    _, _, sure_mass, sure_count = narrowed(p_sums, tl.load(p_row + 4), tl.load(p_row + 5), asked, LEVELS)
    n_listed = tl.load(p_listed + i_row * 2).to(tl.int32)
    p_logits += i_row * logits_row
    p_tokens += i_row * V
    # As a rule one block is all. It stays in registers; what is more is read again and again.
    first = _listed(p_logits, p_tokens, 0, n_listed, BLOCK)
    low = tl.min(tl.where(first > -INF, ordered(first), 0x7FFFFFFF), 0)
    high = tl.max(tl.where(first > -INF, ordered(first), -0x7FFFFFFF), 0)
    for start in range(BLOCK, n_listed, BLOCK):
        x = _listed(p_logits, p_tokens, start, n_listed, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(x > -INF, ordered(x), 0x7FFFFFFF), 0))
        high = tl.maximum(high, tl.max(tl.where(x > -INF, ordered(x), -0x7FFFFFFF), 0))
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        t = unordered(middle.to(tl.int32))
        mass, count = _from(first, t, top)
        for start in range(BLOCK, n_listed, BLOCK):
            more_mass, more_count = _from(_listed(p_logits, p_tokens, start, n_listed, BLOCK), t, top)
            mass += more_mass
            count += more_count
        if reached(t, sure_mass + mass, sure_count + count, asked):
            low = middle
        else:
            high = middle - 1
    t = unordered(low.to(tl.int32))
    stream = splitmix64(tl.load(p_int64 + slot * int64_row), tl.load(p_positions + i_row))
    temperature = tl.load(p_fp32 + slot * fp32_row)
    best = tl.load(p_listed + i_row * 2 + 1)
    for start in range(0, n_listed, BLOCK):
        o_listed = start + tl.arange(0, BLOCK)
        tokens = tl.load(p_tokens + o_listed, mask=o_listed < n_listed, other=0)
        x = tl.load(p_logits + tokens, mask=o_listed < n_listed, other=-INF).to(tl.float32)
        packed = pack(ordered(scores(x, top, temperature, stream, tokens)), tokens)
        best = tl.maximum(best, tl.max(tl.where((o_listed < n_listed) & (x >= t), packed, NOTHING), 0))
    tl.store(p_out + i_row, tl.where(tl.abs(top) < INF, packed_index(best), -1))


def draw_filtered(logits: Tensor, fp32: Tensor, int64: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """As `draw`, from the tokens that the slot's top_p, min_p and top_k leave; neutral values leave all."""
    n_rows, vocab = logits.shape
    device = logits.device
    out = torch.empty(n_rows, dtype=torch.int64, device=device)
    if n_rows == 0:
        return out
    tuned = config("draw_filtered", device, columns=vocab, rows=n_rows)
    levels, block = tuned["LEVELS"], tuned["BLOCK"]
    n_blocks = cdiv(vocab, block)
    stats = torch.empty(n_rows, 3, n_blocks, device=device)
    row = torch.empty(n_rows, ROW.value, device=device)
    sums = torch.empty(n_rows, 4, levels, dtype=torch.int64, device=device)
    listed = torch.empty(n_rows, 2, dtype=torch.int64, device=device)
    tokens = torch.empty(n_rows, vocab, dtype=torch.int32, device=device)
    wishes = (fp32, int64, slots)
    strides = (logits.stride(0), fp32.stride(0), int64.stride(0))
    grid = (n_blocks, n_rows)
    options = {"num_warps": tuned["num_warps"]}
    sizes = {"LEVELS": levels, "BLOCK": block}
    launch(stats_kernel, grid, logits, stats, sums, listed, vocab, n_blocks, strides[0], options=options, **sizes)
    for look in (0, 1):
        launch(
            count_kernel,
            grid,
            logits,
            *wishes,
            stats,
            row,
            sums,
            vocab,
            n_blocks,
            *strides,
            options=options,
            **sizes,
            look=look,
            STEP=tuned["STEP"],
            BLOCKS=next_power_of_2(n_blocks),
        )
    given = (logits, *wishes, positions, row, sums, listed, tokens)
    launch(split_kernel, grid, *given, vocab, *strides, options=options, **sizes)
    settle = {"num_warps": tuned["settle_warps"]}
    launch(settle_kernel, (n_rows,), *given, out, vocab, *strides, options=settle, LEVELS=levels, BLOCK=tuned["SETTLE"])
    return out
