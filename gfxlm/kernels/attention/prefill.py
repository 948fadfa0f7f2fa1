"""Attention of many rows: flash attention (Dao, 2023) over caches, or over given keys.

A program's rows are the heads of one key head at neighbouring positions, so that few positions fill a tile too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.attention.store import Store, facts, strides
from gfxlm.kernels.attention.walk import begin, gated, load_query, walk
from gfxlm.kernels.batch import Batch, Span
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config


@dataclass(frozen=True, slots=True)
class Tiles:
    """The sequences cut into tiles of `size` positions; if causal, those with the most keys first.

    An entry is a slot, its first row, rows, the position of the first row, and keys.
    """

    size: int
    causal: bool
    columns: ClassVar[int] = 5

    def entries(self, spans: Sequence[Span]) -> list[tuple[int, ...]]:
        """As `Table` says."""
        tiles: list[tuple[int, ...]] = []
        for span in spans:
            slot, context = (span.slot, span.context) if span.slot >= 0 else (0, 0)
            for start in range(0, span.rows, self.size):
                rows = min(self.size, span.rows - start)
                tiles.append((slot, span.start + start, rows, context - span.rows + start, context))
        return sorted(tiles, key=lambda tile: -tile[3]) if self.causal else tiles

    def most(self, rows: int, spans: int) -> int:
        """As `Table` says."""
        return cdiv(rows, self.size) + spans


@triton.jit
def prefill_kernel(
    p_q,
    p_k,
    p_v,
    p_k_pairs,
    p_v_pairs,
    p_out,
    p_tiles,  # int32 (n_tiles, 5)
    p_pages,
    p_mask,
    p_sinks,
    p_gate,
    n_pages,
    stride_q_slot,
    stride_q_row,
    stride_q_head,
    stride_k_slot,
    stride_k_key,
    stride_k_head,
    stride_v_slot,
    stride_v_key,
    stride_v_head,
    stride_out_slot,
    stride_out_row,
    stride_out_head,
    stride_mask_slot,
    stride_mask_head,
    stride_mask_row,
    stride_mask_key,
    stride_gate_row,
    stride_gate_head,
    scale: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    heads: tl.constexpr,
    group: tl.constexpr,
    pack: tl.constexpr,
    causal: tl.constexpr,
    window: tl.constexpr,
    mask_kind: tl.constexpr,
    sinks: tl.constexpr,
    gate: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    page_size: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`pack` heads at the positions of one tile. The heads of a tile follow each other, the longest tiles go first."""
    packs: tl.constexpr = heads // pack
    i_pack = tl.program_id(0) % packs
    p_tile = p_tiles + tl.program_id(0) // packs * 5
    slot, row, rows = tl.load(p_tile).to(tl.int64), tl.load(p_tile + 1).to(tl.int64), tl.load(p_tile + 2)
    position, context = tl.load(p_tile + 3), tl.load(p_tile + 4)

    o_m = tl.arange(0, BLOCK_M)
    o_row, o_head = o_m // pack, i_pack * pack + o_m % pack
    m_m = o_row < rows
    o_position = position + o_row
    o_q = slot * stride_q_slot + (row + o_row) * stride_q_row + o_head * stride_q_head
    query = load_query(p_q + o_q[:, None], m_m, D, BLOCK_D, CHUNK, bits)

    keys = (p_k, p_k_pairs, stride_k_slot, stride_k_key, stride_k_head)
    values = (p_v, p_v_pairs, stride_v_slot, stride_v_key, stride_v_head)
    pages = (p_pages, n_pages)
    o_mask = slot * stride_mask_slot + (row + o_row) * stride_mask_row + o_head * stride_mask_head
    mask = (p_mask, o_mask, m_m, stride_mask_key)
    i_head = i_pack * pack // group
    unit: tl.constexpr = 1.0 if mask_kind == "added" else 1.4426950408889634
    halves: tl.constexpr = 2 if bits == 4 else 1
    state = begin(p_sinks, o_head, m_m, BLOCK_M, BLOCK_DV // halves, unit, sinks)

    # What some row sees, [first, last), and within it, in whole tiles from `first`, what every row sees.
    first, last = 0, context
    if causal:
        last = tl.maximum(tl.minimum(position + rows, context), 0)
    if window > 0:
        first = tl.minimum(tl.maximum(position - window + 1, 0), last)
    begun, done = first, first
    if mask_kind == "none":
        if window > 0:
            begun = first + tl.cdiv(tl.maximum(position + rows - window - first, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(position + 1, context) if causal else context
        begun = tl.minimum(begun, last)
        done = begun + tl.maximum(whole - begun, 0) // BLOCK_N * BLOCK_N
    if window > 0:
        state = walk(
            query, state, keys, values, pages, mask, slot, i_head, first, begun, o_position,
            scale, D, DV, BLOCK_D, BLOCK_DV, CHUNK, causal, not causal, window, mask_kind, bits, group_size, page_size,
            True, BLOCK_N,
        )  # fmt: skip
    if mask_kind == "none":
        state = walk(
            query, state, keys, values, pages, mask, slot, i_head, begun, done, o_position,
            scale, D, DV, BLOCK_D, BLOCK_DV, CHUNK, causal, not causal, window, mask_kind, bits, group_size, page_size,
            False, BLOCK_N,
        )  # fmt: skip
    state = walk(
        query, state, keys, values, pages, mask, slot, i_head, done, last, o_position,
        scale, D, DV, BLOCK_D, BLOCK_DV, CHUNK, causal, not causal, window, mask_kind, bits, group_size, page_size,
        True, BLOCK_N,
    )  # fmt: skip

    b_sum = tl.where(state[1] == 0.0, 1.0, state[1])[:, None]
    o_out = slot * stride_out_slot + (row + o_row) * stride_out_row + o_head * stride_out_head
    o_gate = (row + o_row) * stride_gate_row + o_head * stride_gate_head
    for half in tl.static_range(halves):
        o_dv = half * (BLOCK_DV // halves) + tl.arange(0, BLOCK_DV // halves)
        m_out = m_m[:, None] & (o_dv < DV)[None, :]
        b_out = state[2 + half] / b_sum
        if gate:
            b_out = gated(b_out, p_gate, o_gate[:, None] + o_dv[None, :], m_out)
        tl.store(p_out + o_out[:, None] + o_dv[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)


def prefill(
    q: Tensor,
    k: Store,
    v: Store,
    out: Tensor,
    batch: Batch,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    pages: Tensor | None = None,
) -> None:
    """Write the attention of all of a batch's rows into `out`.

    q is (slots or 1, rows, Hq, D) and out (slots or 1, rows, Hq, DV): where there is one for all slots, rows are those
    of a flattened batch, otherwise a span's are those of its slot. k and v are (slots, keys, Hkv, D or DV), or with
    `pages`, int32 (slots, n), (pages, page size, ...). mask is 4-D and expanded to (slots, Hq, rows, keys): boolean,
    or added. sinks is (Hq,) and gate (rows, Hq, DV). The features of all lie side by side; scale is positive. The last
    row of a span sees all of its context, the row before one less if causal; a row that sees nothing gives zeros, and
    so does padding.
    """
    if batch.longest == 0:
        return
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    # Heads beyond 16 to a key head, or a number of them that has no such divisor, are tiles of their own.
    pack = max(n for n in range(1, min(group, 16) + 1) if group % n == 0)
    (codes, k_pairs, bits, group_size), (v_codes, v_pairs, _, _) = facts(k), facts(v)
    sizes = config(
        "attention_prefill",
        q.device,
        head_size=max(q.shape[3], v.shape[3]),
        rows=batch.longest * pack,
        bits=bits,
        masked=mask is not None,
        paged=pages is not None,
        dtype=str(q.dtype)[6:],
    )
    block_m = sizes["BLOCK_M"]
    tiles = batch.table(Tiles(block_m // pack, causal))
    mask_kind = "none" if mask is None else "shown" if mask.dtype == torch.bool else "added"
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    launch(
        prefill_kernel,
        (len(tiles) * (heads // pack),),
        q, codes, v_codes, k_pairs, v_pairs, out, tiles, pages, mask,
        None if sinks is None else sinks.contiguous(), gate,
        0 if pages is None else pages.stride(0),
        *_slot_strides(q), *strides(k), *strides(v), *_slot_strides(out),
        *((0, 0, 0, 0) if mask is None else mask.stride()),
        *((0, 0) if gate is None else gate.stride()[:2]),
        options=sizes["options"],
        scale=scale,
        D=q.shape[3],
        DV=v.shape[3],
        heads=heads,
        group=group,
        pack=pack,
        causal=causal,
        window=window or 0,
        mask_kind=mask_kind,
        sinks=sinks is not None,
        gate=gate is not None,
        bits=bits,
        group_size=group_size,
        page_size=0 if pages is None else k.shape[1],
        BLOCK_D=max(16, next_power_of_2(q.shape[3])),
        BLOCK_DV=max(16, next_power_of_2(v.shape[3])),
        CHUNK=min(sizes.get("CHUNK", 1024), max(16, next_power_of_2(q.shape[3]))),
        BLOCK_M=block_m,
        BLOCK_N=sizes["BLOCK_N"],
    )  # fmt: skip


def _slot_strides(x: Tensor) -> tuple[int, ...]:
    return (0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:3])
