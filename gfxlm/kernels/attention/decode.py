"""Attention of one row, or a few, of each sequence: keys are split among programs, whose parts a second kernel joins.

How long a sequence is stands in the positions, on the device: a captured launch serves every length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.attention.join import join_kernel, share
from gfxlm.kernels.attention.store import Store, facts, strides
from gfxlm.kernels.attention.walk import begin, gated, load_query, walk
from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config

# Rows of one sequence, as speculative decoding has them.
MAX_QUERIES = 8
_MAX_SPLITS = 128


@triton.jit
def decode_kernel(
    p_q,
    p_k,
    p_v,
    p_k_pairs,
    p_v_pairs,
    p_out,
    p_parts,  # fp32 (sequences * queries, Hq, splits, DV)
    p_tops,  # fp32 (2, sequences * queries, Hq, splits): maximum and sum
    p_positions,  # int64 (sequences * queries)
    p_slots,
    p_pages,
    p_sinks,
    p_gate,
    n_pages,
    stride_q_row,
    stride_q_head,
    stride_k_slot,
    stride_k_key,
    stride_k_head,
    stride_v_slot,
    stride_v_key,
    stride_v_head,
    stride_gate_row,
    stride_gate_head,
    scale: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    heads: tl.constexpr,
    group: tl.constexpr,
    pack: tl.constexpr,
    queries: tl.constexpr,
    splits: tl.constexpr,
    window: tl.constexpr,
    sinks: tl.constexpr,
    gate: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    page_size: tl.constexpr,
    early: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One split of the keys for `pack` heads of one sequence; with a single split, the result itself."""
    after_the_last(early)
    i_split, i_pack, i_sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(p_slots + i_sequence * queries)
    first, last, position = share(p_positions, i_sequence, i_split, queries, window, splits, BLOCK_N)
    if slot < 0:
        last = first
    if (splits > 1) & (first >= last):
        return

    o_m = tl.arange(0, BLOCK_M)
    o_query, o_head = o_m // pack, i_pack * pack + o_m % pack
    m_m = o_query < queries
    o_row = (i_sequence * queries + o_query).to(tl.int64)
    o_position = position + o_query
    query = load_query(p_q + (o_row * stride_q_row + o_head * stride_q_head)[:, None], m_m, D, BLOCK_D, CHUNK, bits)

    keys = (p_k, p_k_pairs, stride_k_slot, stride_k_key, stride_k_head)
    values = (p_v, p_v_pairs, stride_v_slot, stride_v_key, stride_v_head)
    pages, mask = (p_pages, n_pages), (p_q,)
    i_head = i_pack * pack // group
    # A sink counts once: in the first split.
    m_sink = o_query < tl.where(i_split == 0, queries, 0)
    halves: tl.constexpr = 2 if bits == 4 else 1
    state = begin(p_sinks, o_head, m_sink, BLOCK_M, BLOCK_DV // halves, 1.4426950408889634, sinks)
    done = first
    if (queries == 1) | (window == 0):
        done = first + tl.maximum(tl.minimum(last, position + 1) - first, 0) // BLOCK_N * BLOCK_N
        state = walk(
            query, state, keys, values, pages, mask, slot, i_head, first, done, o_position,
            scale, D, DV, BLOCK_D, BLOCK_DV, CHUNK, queries > 1, True, window, "none", bits, group_size, page_size,
            False, BLOCK_N,
        )  # fmt: skip
    state = walk(
        query, state, keys, values, pages, mask, slot, i_head, done, last, o_position,
        scale, D, DV, BLOCK_D, BLOCK_DV, CHUNK, queries > 1, True, window, "none", bits, group_size, page_size,
        True, BLOCK_N,
    )  # fmt: skip

    before_the_next(early)
    b_max, b_sum = state[0], state[1]
    o_out = o_row * heads + o_head
    o_part = o_out * splits + i_split
    for half in tl.static_range(halves):
        o_dv = half * (BLOCK_DV // halves) + tl.arange(0, BLOCK_DV // halves)
        m_out = m_m[:, None] & (o_dv < DV)[None, :]
        b_out = state[2 + half]
        if splits == 1:
            b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
            if gate:
                o_gate = o_row * stride_gate_row + o_head * stride_gate_head
                b_out = gated(b_out, p_gate, o_gate[:, None] + o_dv[None, :], m_out)
            tl.store(p_out + o_out[:, None] * DV + o_dv[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)
        else:
            tl.store(p_parts + o_part[:, None] * DV + o_dv[None, :], b_out, mask=m_out)
    if splits > 1:
        n_parts = tl.num_programs(2).to(tl.int64) * (queries * heads * splits)
        tl.store(p_tops + o_part, b_max, mask=m_m)
        tl.store(p_tops + n_parts + o_part, b_sum, mask=m_m)


def decode(
    q: Tensor,
    k: Store,
    v: Store,
    out: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    scale: float,
    queries: int = 1,
    window: int | None = None,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    pages: Tensor | None = None,
) -> None:
    """Write the attention of each sequence's last `queries` rows into `out`, contiguous (N, Hq, DV).

    q is (N, Hq, D) with N = sequences * queries, positions and slots are int64 (N,), contiguous; a sequence's rows
    have neighbouring positions, and a negative slot asks for zeros. k and v are (slots, keys, Hkv, D or DV), or with
    `pages`, int32 (slots, n), (pages, page size, ...). gate is (N, Hq, DV). The features of all lie side by side;
    scale is positive.
    """
    n, heads, head_size = q.shape
    group = heads // k.shape[2]
    pack = max(p for p in range(1, min(group, 16) + 1) if group % p == 0)
    sequences, keys = n // queries, k.shape[1] * (1 if pages is None else pages.shape[1])
    (codes, k_pairs, bits, group_size), (v_codes, v_pairs, _, _) = facts(k), facts(v)
    dv = v.shape[3]
    sizes = config(
        "attention_decode",
        q.device,
        head_size=max(head_size, dv),
        rows=pack * queries,
        bits=bits,
        paged=pages is not None,
        dtype=str(q.dtype)[6:],
    )
    programs = sequences * (heads // pack)
    splits = max(1, min(sizes["programs"] // max(programs, 1), cdiv(keys, sizes["BLOCK_N"]), _MAX_SPLITS))
    parts = q.new_empty((n, heads, splits, dv) if splits > 1 else (0,), dtype=torch.float32)
    tops = q.new_empty((2, n, heads, splits) if splits > 1 else (0,), dtype=torch.float32)
    gate_strides = (0, 0) if gate is None else gate.stride()[:2]
    shared = {
        "DV": dv, "heads": heads, "queries": queries, "splits": splits, "window": window or 0,
        "gate": gate is not None, "BLOCK_N": sizes["BLOCK_N"],
    }  # fmt: skip
    if programs == 0:
        return
    launch(
        decode_kernel,
        (splits, heads // pack, sequences),
        q, codes, v_codes, k_pairs, v_pairs, out, parts, tops, positions, slots, pages,
        None if sinks is None else sinks.contiguous(), gate,
        0 if pages is None else pages.stride(0),
        *q.stride()[:2], *strides(k), *strides(v), *gate_strides,
        options=sizes["options"],
        scale=scale,
        D=head_size,
        group=group,
        pack=pack,
        sinks=sinks is not None,
        bits=bits,
        group_size=group_size,
        page_size=0 if pages is None else k.shape[1],
        BLOCK_D=max(16, next_power_of_2(head_size)),
        BLOCK_DV=max(16, next_power_of_2(dv)),
        CHUNK=min(sizes.get("CHUNK", 1024), max(16, next_power_of_2(head_size))),
        BLOCK_M=max(16, next_power_of_2(pack * queries)),
        **shared,
    )  # fmt: skip
    if splits > 1:
        block_dv = min(sizes["BLOCK_DV"], next_power_of_2(dv))
        launch(
            join_kernel,
            (cdiv(dv, block_dv), heads, n),
            out, parts, tops, positions, slots, gate, *gate_strides,
            options=sizes["join"],
            BLOCK_S=next_power_of_2(splits),
            BLOCK_DV=block_dv,
            **shared,
        )  # fmt: skip
