"""How the keys of a sequence are shared among programs, and how what these found is joined."""

import triton
import triton.language as tl

from gfxlm.kernels.attention.walk import gated
from gfxlm.kernels.early import after_the_last, before_the_next


@triton.jit
def share(p_positions, i_sequence, i_split, queries: tl.constexpr, window: tl.constexpr, splits, BLOCK_N: tl.constexpr):
    """The keys [first, last) of one split, or of several: none has more than one block more than another."""
    position = tl.load(p_positions + i_sequence * queries).to(tl.int32)
    context = tl.load(p_positions + i_sequence * queries + queries - 1).to(tl.int32) + 1
    start = tl.maximum(position - window + 1, 0) if window > 0 else 0
    blocks = tl.cdiv(context - start, BLOCK_N)
    # Rounded up: the first split, which has the sink, always has keys.
    first = start + tl.cdiv(i_split * blocks, splits) * BLOCK_N
    return first, tl.minimum(start + tl.cdiv((i_split + 1) * blocks, splits) * BLOCK_N, context), position


@triton.jit
def join_kernel(
    p_out,
    p_parts,
    p_tops,
    p_positions,
    p_slots,
    p_gate,
    stride_gate_row,
    stride_gate_head,
    DV: tl.constexpr,
    heads: tl.constexpr,
    queries: tl.constexpr,
    splits: tl.constexpr,
    window: tl.constexpr,
    gate: tl.constexpr,
    early: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Join the splits of one head and row, as far as it has keys; zeros for a row without a slot."""
    before_the_next(early)
    after_the_last(early)
    i_head, i_row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    o_dv = tl.program_id(0) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_s, m_dv = o_s < splits, o_dv < DV
    o_part = (i_row * heads + i_head) * splits + o_s
    n_parts = tl.num_programs(2).to(tl.int64) * (heads * splits)
    # All parts are read at once with the position, and what no split has written is dropped: nothing waits twice.
    b_max = tl.load(p_tops + o_part, mask=m_s, other=0.0)
    b_sum = tl.load(p_tops + n_parts + o_part, mask=m_s, other=0.0)
    p_part = p_parts + o_part[:, None] * DV + o_dv[None, :]
    b_parts = tl.load(p_part, mask=m_s[:, None] & m_dv[None, :], other=0.0)  # (BLOCK_S, BLOCK_DV)
    first, last, _ = share(p_positions, i_row // queries, o_s, queries, window, splits, BLOCK_N)
    m_s &= (first < last) & (tl.load(p_slots + i_row) >= 0)
    b_max = tl.where(m_s, b_max, -3.4028234663852886e38)
    b_weights = tl.where(m_s, tl.exp2(b_max - tl.max(b_max, 0)), 0.0)
    total = tl.sum(tl.where(m_s, b_sum, 0.0) * b_weights, 0)
    b_parts = tl.where(m_s[:, None], b_parts, 0.0)
    b_out = tl.sum(b_parts * b_weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    if gate:
        b_out = gated(b_out, p_gate, i_row * stride_gate_row + i_head * stride_gate_head + o_dv, m_dv)
    tl.store(p_out + (i_row * heads + i_head) * DV + o_dv, b_out.to(p_out.dtype.element_ty), mask=m_dv)
