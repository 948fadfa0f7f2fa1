"""Products of many rows with the experts that each has chosen: rows are sorted, and a tile of them has one expert."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.launch import launch
from gfxlm.kernels.linear.deal import deal, tile_sums
from gfxlm.kernels.linear.planes import format_of, operands, tile_dot, tile_periods, unpacking
from gfxlm.kernels.moe.combine import combine
from gfxlm.kernels.moe.sort import Sorted, moe_sort
from gfxlm.kernels.packed import Packed
from gfxlm.kernels.sizes import cdiv
from gfxlm.kernels.tuning import config

Stack = Packed | Tensor  # a Tensor is a dense stack (E, N, K)


@triton.jit(do_not_specialize=["tiles"])
def grouped_kernel(
    p_x,  # (rows, K), dealt into planes
    p_sums,  # fp32 (rows, K / (BLOCK_W * PERIOD)), for UNPACK "sums"
    p_w,  # int16 (E, N, K * BITS / 16)
    p_scales,  # (E, N, K / GROUP), strided
    p_biases,
    p_order,  # sorted row to routed row, as Sorted has it
    p_tiles,  # (3, tiles): expert, first sorted row, end
    p_y,  # (routed rows, N)
    tiles,
    N,
    stride_expert_w,
    stride_w,
    stride_expert_scale,
    stride_scale,
    stride_group,
    K: tl.constexpr,
    BITS: tl.constexpr,
    PERIOD: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    SCALES: tl.constexpr,
    UNPACK: tl.constexpr,
    FANOUT: tl.constexpr,
    GATED: tl.constexpr,
    OUT_PERIOD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """BLOCK_N columns of one tile of rows. Neighbouring programs share the rows of x, next to them those of w.

    FANOUT > 0: x has one row for FANOUT routed rows; 0: x has a row for each sorted row. GATED: w holds gate rows, then
    up rows; the result is silu(gate) * up, (sorted rows, N / 2), dealt into OUT_PERIOD planes. Otherwise rows of the
    result are routed rows.
    """
    n_blocks = tl.cdiv(N, BLOCK_N)
    i_tile = tl.program_id(0) // n_blocks
    expert = tl.load(p_tiles + i_tile)
    if expert < 0:
        return
    first_m = tl.load(p_tiles + tiles + i_tile)
    end_m = tl.load(p_tiles + 2 * tiles + i_tile)
    o_m = first_m + tl.arange(0, BLOCK_M)
    m_m = o_m < end_m
    rows = tl.load(p_order + o_m, mask=m_m, other=0)
    known = rows >= 0
    rows = tl.where(known, rows, ~rows)
    rows_x = (rows // FANOUT if FANOUT > 0 else o_m).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    first_n = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_N
    if GATED:
        # Groups of 8 gate rows and 8 up rows by turns; with those of one plane of the result side by side.
        half: tl.constexpr = BLOCK_N // 2
        column = o_n // 16 * 8 + o_n % 8
        run: tl.constexpr = half // OUT_PERIOD
        o_n = column % run * OUT_PERIOD + column // run
        first_n = first_n // 2
        o_n = tl.minimum(first_n + o_n, N // 2 - 1) + tl.where(tl.arange(0, BLOCK_N) // 8 % 2 == 1, N // 2, 0)
        first_w = first_n * 0
    else:
        o_n = tl.minimum(o_n, (N - 1 - first_n).to(tl.int32))
        first_w = first_n
    expert = expert.to(tl.int64)
    scales_at = expert * stride_expert_scale + first_w * stride_scale
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = tile_dot(
        acc,
        p_w + expert * stride_expert_w + first_w * stride_w,
        p_scales + scales_at,
        p_biases + scales_at,
        o_n.to(tl.int32) * stride_w,
        o_n.to(tl.int32) * stride_scale,
        stride_group,
        p_x + rows_x * K,
        p_sums + rows_x * (K // PERIOD // BLOCK_W),
        m_m,
        0,
        K,
        BITS,
        PERIOD,
        GROUP,
        MODE,
        SCALES,
        UNPACK,
        BLOCK_W,
        1,
    )
    if GATED:
        pairs = tl.permute(tl.reshape(acc, [BLOCK_N // 16, 2, 8, BLOCK_M]), [0, 2, 3, 1])
        gate, up = tl.split(tl.reshape(pairs, [half, BLOCK_M, 2]))
        b_y = gate / (1.0 + tl.exp(-gate)) * up
        column = tl.arange(0, half)
        o_y = column // run * (N // 2 // OUT_PERIOD) + first_n // OUT_PERIOD + column % run
        m_y = first_n + column % run * OUT_PERIOD + column // run < N // 2
        p_rows = p_y + o_m.to(tl.int64) * (N // 2)
    else:
        b_y = tl.where(known[None, :], acc, 0.0)
        o_y = first_n + tl.arange(0, BLOCK_N)
        m_y = o_y < N
        p_rows = p_y + rows.to(tl.int64) * N
    tl.store(p_rows[None, :] + o_y[:, None], b_y.to(p_y.dtype.element_ty), mask=m_y[:, None] & m_m[None, :])


def expert_mlp_prefill(
    x: Tensor,
    experts: Tensor,
    scores: Tensor,
    gate_up: Stack,
    down: Stack,
    *,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`sum_k scores_k * down_k(silu(gate_k x) * up_k x) + shared + residual`, each expert read once a row tile.

    x (T, D), experts int32 or int64 (T, k), scores fp32 (T, k), gate_up (E, 2 I, D) with gate rows first, down
    (E, D, I), shared and residual (T, D). Returns (T, D) in x's dtype; an expert out of range counts as zero. The sum
    is in fp32 and in the order of `experts`. Nothing depends on the data but which rows a tile holds.
    """
    tokens, k = experts.shape
    _, n, columns = _shape(gate_up)
    if tokens == 0:
        return x.new_empty((tokens, columns))
    tuned = _tuned(x, experts, gate_up, gated=True)
    tuned_down = {**_tuned(x, experts, down, gated=False), "block_m": tuned["block_m"]}
    layout = moe_sort(experts, _shape(gate_up)[0], tuned["block_m"])
    out_period = int(format_of(down)["PERIOD"])
    hidden = torch.empty((tokens * k, n // 2), dtype=x.dtype, device=x.device)
    dealt = deal(x, int(format_of(gate_up)["PERIOD"]))
    _multiply(dealt, gate_up, layout, hidden, tuned, FANOUT=k, GATED=True, OUT_PERIOD=out_period)
    routed = torch.empty((tokens * k, columns), dtype=x.dtype, device=x.device)
    _multiply(hidden, down, layout, routed, tuned_down, FANOUT=0, GATED=False, OUT_PERIOD=1)
    return combine(routed.view(tokens, k, columns), scores, shared, residual)


def grouped_matmul(x: Tensor, experts: Tensor, stack: Stack) -> Tensor:
    """`x[t] @ w[experts[t, j]].T` for x (T, K), experts int32 or int64 (T, k) and a stack (E, N, K): (T, k, N).

    Rows of an expert out of range are zero.
    """
    tokens, k = experts.shape
    count, n, _ = _shape(stack)
    y = torch.empty((tokens * k, n), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y.view(tokens, k, n)
    tuned = _tuned(x, experts, stack, gated=False)
    layout = moe_sort(experts, count, tuned["block_m"])
    dealt = deal(x, int(format_of(stack)["PERIOD"]))
    _multiply(dealt, stack, layout, y, tuned, FANOUT=k, GATED=False, OUT_PERIOD=1)
    return y.view(tokens, k, n)


def _shape(stack: Stack) -> tuple[int, int, int]:
    """(E, N, K)."""
    if isinstance(stack, Tensor):
        return stack.shape[0], stack.shape[1], stack.shape[2]
    return stack.words.shape[0], stack.rows, stack.columns


def _tuned(x: Tensor, experts: Tensor, stack: Stack, *, gated: bool) -> dict[str, Any]:
    """Tiles for the rows that an expert gets on average."""
    rows = -(-experts.numel() // _shape(stack)[0])
    bits = 16 if isinstance(stack, Tensor) else stack.bits
    return config("grouped", x.device, rows=rows, bits=bits, itemsize=x.itemsize, gated=gated)


def _multiply(x: Tensor, stack: Stack, layout: Sorted, y: Tensor, tuned: dict[str, Any], **constants: Any) -> None:
    """Start grouped_kernel. `tuned` holds unpack, block_n, block_m, block_k and the compiler's options."""
    fmt = format_of(stack)
    options = dict(tuned)
    block_n, block_m, block_k = (options.pop(name) for name in ("block_n", "block_m", "block_k"))
    unpack = unpacking(options.pop("unpack"), x, stack)
    _, n, columns = _shape(stack)
    period, block_w = int(fmt["PERIOD"]), tile_periods(block_k, stack, unpack)
    words, scales, biases = operands(stack)
    launch(
        grouped_kernel,
        (layout.tiles.shape[1] * cdiv(n, block_n),),
        x,
        tile_sums(x, period, block_w * period) if unpack == "sums" else x,
        words,
        scales,
        biases,
        layout.order,
        layout.tiles,
        y,
        layout.tiles.shape[1],
        n,
        *words.stride()[:2],
        *scales.stride(),
        K=columns,
        **fmt,
        UNPACK=unpack,
        **constants,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_W=block_w,
        options=options,
    )
