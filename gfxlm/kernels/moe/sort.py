"""Rows sorted by expert, on the GPU and without asking the host: a counting sort that keeps the order of equals."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config


@dataclass(frozen=True, slots=True)
class Sorted:
    """Routed rows grouped by expert, and the row tiles that grouped products work through. Both int32, on the GPU.

    A routed row is a flat position in the (T, k) experts. One whose expert is out of range lies among the last expert's
    with its bits inverted: a negative number. There are as many tiles as there could be at most; what is not needed has
    expert -1.
    """

    order: Tensor  # (T k,) routed rows, sorted
    tiles: Tensor  # (3, tiles): expert, first sorted row, end of the expert's sorted rows


@triton.jit
def _load_experts(p_experts, o, n, E):
    """Expert of each routed row and whether it is in range; -1 past the end."""
    experts = tl.load(p_experts + o, mask=o < n, other=0)
    known = (experts >= 0) & (experts < E)
    return tl.where(o < n, tl.where(known, experts, E - 1), -1).to(tl.int32), known


@triton.jit(do_not_specialize=["n"])
def count_kernel(p_experts, p_counts, n, E, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """counts[chunk, e]: how many rows of a chunk have expert e."""
    i_chunk = tl.program_id(0)
    o_row = i_chunk * CHUNK + tl.arange(0, CHUNK)
    experts, _ = _load_experts(p_experts, o_row, n, E)
    counts = tl.histogram(experts, BINS, mask=o_row < n)
    tl.store(p_counts + i_chunk * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(p_counts, p_ends, p_tile_ends, chunks, BLOCK: tl.constexpr, BINS: tl.constexpr, AHEAD: tl.constexpr):
    """In place, counts[chunk, e] becomes the rows of e in the chunks before; where each expert's rows and tiles end."""
    o_e = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    for start in range(0, chunks, AHEAD):
        o_count = start * BINS + o_e
        counts = ()  # AHEAD loads are on their way at a time
        for i in tl.static_range(AHEAD):
            o_i = o_count + i * BINS
            counts = counts + (tl.load(p_counts + o_i, mask=o_i < chunks * BINS, other=0),)  # noqa: RUF005
        for i in tl.static_range(AHEAD):
            o_i = o_count + i * BINS
            tl.store(p_counts + o_i, total, mask=o_i < chunks * BINS)
            total += counts[i]
    tl.store(p_ends + o_e, tl.cumsum(total, 0))
    tl.store(p_tile_ends + o_e, tl.cumsum((total + BLOCK - 1) // BLOCK, 0))


@triton.jit(do_not_specialize=["n", "tiles"])
def place_kernel(
    p_experts,
    p_before,
    p_ends,
    p_tile_ends,
    p_order,
    p_tiles,
    n,
    E,
    tiles,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Each row of a chunk to its sorted place; then TILES tiles are described."""
    i_chunk = tl.program_id(0)
    if i_chunk * CHUNK < n:
        o_row = i_chunk * CHUNK + tl.arange(0, CHUNK)
        m_row = o_row < n
        experts, known = _load_experts(p_experts, o_row, n, E)
        earlier = tl.zeros([CHUNK, STEP], tl.int32)
        for start in range(0, CHUNK, STEP):
            o_other = i_chunk * CHUNK + start + tl.arange(0, STEP)
            others, _ = _load_experts(p_experts, o_other, n, E)
            earlier += ((others[None, :] == experts[:, None]) & (o_other[None, :] < o_row[:, None])).to(tl.int32)
        place = tl.sum(earlier, 1) + tl.load(p_ends + experts - 1, mask=m_row & (experts > 0), other=0)
        place += tl.load(p_before + i_chunk * BINS + experts, mask=m_row, other=0)
        tl.store(p_order + place, tl.where(known, o_row, ~o_row), mask=m_row)
    o_tile = i_chunk * TILES + tl.arange(0, TILES)
    m_tile = o_tile < tiles
    tile_ends = tl.load(p_tile_ends + tl.arange(0, BINS))
    expert = tl.sum((tile_ends[None, :] <= o_tile[:, None]).to(tl.int32), 1)  # the first whose tiles end after this one
    used = m_tile & (expert < E)
    later = used & (expert > 0)
    first_tile = tl.load(p_tile_ends + expert - 1, mask=later, other=0)
    first = tl.load(p_ends + expert - 1, mask=later, other=0) + (o_tile - first_tile) * BLOCK
    tl.store(p_tiles + o_tile, tl.where(used, expert, -1), mask=m_tile)
    tl.store(p_tiles + tiles + o_tile, first, mask=m_tile)
    tl.store(p_tiles + 2 * tiles + o_tile, tl.load(p_ends + expert, mask=used, other=0), mask=m_tile)


def moe_sort(experts: Tensor, num_experts: int, block: int) -> Sorted:
    """Group the routed rows of `experts` (T, k), int32 or int64, by expert, in tiles of `block` rows.

    Rows of one expert keep their order. No row is dropped, whatever the load; what runs depends on shapes alone.
    """
    if experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts: must be int32 or int64, got {experts.dtype}")
    experts = experts.contiguous()
    n, device = experts.numel(), experts.device
    tiles = min(n, num_experts) + n // block
    order = torch.empty(n, dtype=torch.int32, device=device)
    records = torch.empty((3, tiles), dtype=torch.int32, device=device)
    if n == 0:
        return Sorted(order, records)
    tuned = config("moe_sort", device, n=n)
    chunk, scan_warps = tuned.pop("chunk"), tuned.pop("scan_warps")
    bins = max(64, next_power_of_2(num_experts))
    chunks = cdiv(n, chunk)
    counts = torch.empty((chunks, bins), dtype=torch.int32, device=device)
    ends = torch.empty((2, bins), dtype=torch.int32, device=device)
    launch(count_kernel, (chunks,), experts, counts, n, num_experts, BINS=bins, CHUNK=chunk, options=tuned)
    constants = {"BLOCK": block, "BINS": bins}
    options = {"num_warps": scan_warps}
    launch(scan_kernel, (1,), counts, ends[0], ends[1], chunks, **constants, AHEAD=16, options=options)
    described = max(1, min(32, 2048 // bins))
    launch(
        place_kernel,
        (max(chunks, cdiv(tiles, described)),),
        experts,
        counts,
        ends[0],
        ends[1],
        order,
        records,
        n,
        num_experts,
        tiles,
        **constants,
        CHUNK=chunk,
        STEP=16,
        TILES=described,
        options=tuned,
    )
    return Sorted(order, records)
