"""One token a sequence through a whole gated delta mixer, in one kernel: a program for each value head.

The state is read and written once. The convolution's inputs lie in a ring one longer than is read back, so that a token
overwrites what no program reads any more, and the key head's channels can be convolved by all its value heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.delta.formulas import decay, inverse_root, sigmoid, silu
from gfxlm.kernels.delta.tables import tuned
from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import next_power_of_2


@triton.jit
def _pick(x, i_part, o_part):
    """Row i_part of (4, D)."""
    return tl.sum(tl.where(o_part == i_part, x, 0.0), 0)


@triton.jit
def delta_step_kernel(
    p_qkvz,  # (N, ...) grouped by key head: [q | k | v of its value heads | their z]
    p_ba,  # (N, ...) grouped by key head: [b | a]
    p_weight,  # (taps, channels)
    p_A_log,  # fp32 (Hv,)
    p_dt_bias,  # fp32 (Hv,)
    p_norm,  # (Dv,)
    p_positions,  # int64 (N,)
    p_slots,  # int64 (N,); negative: a row of padding, which gives zeros and touches no cache
    p_ring,  # (slots, taps, channels)
    p_state,  # fp32 (slots, Hv, Dv, Dk)
    p_y,  # (N, Hv, Dv)
    stride_qkvz,
    stride_ba,
    eps: tl.constexpr,
    k_heads: tl.constexpr,
    ratio: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    taps: tl.constexpr,
    early: tl.constexpr,
    TAPS: tl.constexpr,  # a power of two
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One value head of one token. LANES / 4 lanes hold a row of the state: with few, its sums are mostly local."""
    after_the_last(early)
    v_heads: tl.constexpr = k_heads * ratio
    channels: tl.constexpr = 2 * k_heads * k_dim + v_heads * v_dim
    group: tl.constexpr = 2 * k_dim + 2 * ratio * v_dim
    PIECES: tl.constexpr = BLOCK_D // LANES
    TILES: tl.constexpr = BLOCK_D // BLOCK_V
    i_row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    i_key = i_head // ratio
    i_sub = i_head % ratio
    slot = tl.load(p_slots + i_row)
    position = tl.load(p_positions + i_row)
    live = tl.where(slot >= 0, 1, 0)  # nothing of a row of padding is there

    # What needs no slot comes first: its way is not as long.
    o_part = tl.arange(0, 4)[:, None, None]  # q, k, v and nothing
    o_tap = tl.arange(0, TAPS)[None, :, None]
    o_d = tl.arange(0, BLOCK_D)[None, None, :]
    size = tl.where(o_part < 2, k_dim, tl.where(o_part == 2, v_dim, 0)) * live
    channel = tl.where(o_part < 2, (i_key + k_heads * o_part) * k_dim, 2 * k_heads * k_dim + i_head * v_dim)
    m_x = (o_tap < taps) & (o_d < size)
    b_weight = tl.load(p_weight + o_tap * channels + channel + o_d, mask=m_x, other=0.0).to(tl.float32)
    p_x = p_qkvz + i_row * stride_qkvz + i_key * group
    p_gates = p_ba + i_row * stride_ba + i_key * (2 * ratio) + i_sub
    b, a = tl.load(p_gates).to(tl.float32), tl.load(p_gates + ratio).to(tl.float32)
    A_log, dt_bias = tl.load(p_A_log + i_head), tl.load(p_dt_bias + i_head)
    o_y = tl.arange(0, TILES)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]  # (TILES, BLOCK_V)
    m_y = o_y < v_dim
    b_z = tl.load(p_x + 2 * k_dim + (ratio + i_sub) * v_dim + o_y, mask=m_y & (o_y < v_dim * live), other=0.0)
    b_norm = tl.load(p_norm + o_y, mask=m_y, other=0.0)

    age = taps - 1 - o_tap
    p_old = p_ring + slot * (taps * channels) + ((position - age) % taps) * channels + channel + o_d
    source = tl.where(o_part < 2, o_part * k_dim, 2 * k_dim + i_sub * v_dim)
    b_x = tl.load(tl.where(age == 0, p_x + source + o_d, p_old), mask=m_x & (position >= age), other=0.0)
    o_k = tl.arange(0, PIECES)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    o_v = tl.arange(0, BLOCK_V)[None, :, None]
    m_k = o_k < k_dim * live
    p_s = p_state + (slot * v_heads + i_head) * (v_dim * k_dim) + o_v * k_dim + o_k  # (PIECES, BLOCK_V, LANES)
    old = tl.where(position > 0, v_dim, 0)
    b_next = tl.load(p_s, mask=m_k & (o_v < old), other=0.0)

    # One of a key head's value heads keeps its inputs.
    m_kept = (age == 0) & (o_d < tl.where((o_part == 2) | (i_sub == 0), size, 0))
    tl.store(p_old, b_x, mask=m_x & m_kept)
    b_x = silu(tl.sum(b_x.to(tl.float32) * b_weight, 1))  # (4, BLOCK_D)
    o_part = tl.arange(0, 4)
    b_scale = inverse_root(tl.sum(b_x * b_x, 1) + 1e-6) * tl.where(o_part == 0, k_dim**-0.5, 1.0)
    b_x *= tl.where(o_part < 2, b_scale, 1.0)[:, None]
    b_q = tl.reshape(_pick(b_x, 0, o_part[:, None]), [PIECES, LANES])[:, None, :]
    b_k = tl.reshape(_pick(b_x, 1, o_part[:, None]), [PIECES, LANES])[:, None, :]
    b_values = tl.reshape(_pick(b_x, 2, o_part[:, None]), [TILES, BLOCK_V])
    gamma = decay(A_log, a, dt_bias)
    beta = sigmoid(b)

    o_tile = tl.arange(0, TILES)[:, None]
    b_y = tl.zeros([TILES, BLOCK_V], tl.float32)
    for i in tl.static_range(TILES):
        b_s = b_next * gamma
        if i + 1 < TILES:
            b_next = tl.load(p_s + (i + 1) * BLOCK_V * k_dim, mask=m_k & (o_v + (i + 1) * BLOCK_V < old), other=0.0)
        b_v = tl.sum(tl.where(o_tile == i, b_values, 0.0), 0)
        b_delta = beta * (b_v - tl.sum(tl.sum(b_s * b_k, 0), 1))  # (BLOCK_V,)
        b_s += b_delta[None, :, None] * b_k
        tl.store(p_s + i * BLOCK_V * k_dim, b_s, mask=m_k & (o_v + i * BLOCK_V < v_dim))
        b_y = tl.where(o_tile == i, tl.sum(tl.sum(b_s * b_q, 0), 1)[None, :], b_y)

    before_the_next(early)
    b_y *= inverse_root(tl.sum(tl.sum(b_y * b_y, 1), 0) / v_dim + eps)
    b_y *= b_norm.to(tl.float32) * silu(b_z.to(tl.float32))
    tl.store(p_y + (i_row * v_heads + i_head) * v_dim + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


def delta_step(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    k_heads: int,
    positions: Tensor,
    slots: Tensor,
    ring: Tensor,
    state: Tensor,
) -> Tensor:
    """A token a row, rows of different slots: gated and normed outputs (N, Hv * Dv), ring and state updated in place.

    Tensors as `ops.gated_delta_mixer` describes them.
    """
    rows = qkvz.shape[0]
    _, v_heads, v_dim, k_dim = state.shape
    y = torch.empty(rows, v_heads * v_dim, dtype=qkvz.dtype, device=qkvz.device)
    if rows == 0:
        return y
    constants, options = tuned("delta_decode", qkvz.device, k_dim=k_dim, v_dim=v_dim, rows=rows)
    block_d = next_power_of_2(max(k_dim, v_dim))
    constants = {name: min(size, block_d) for name, size in constants.items()}
    launch(
        delta_step_kernel,
        (rows, v_heads),
        qkvz,
        ba,
        conv_weight,
        A_log,
        dt_bias,
        norm_weight,
        positions,
        slots,
        ring,
        state,
        y,
        qkvz.stride(0),
        ba.stride(0),
        options=options,
        eps=eps,
        k_heads=k_heads,
        ratio=v_heads // k_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        taps=conv_weight.shape[0],
        TAPS=next_power_of_2(conv_weight.shape[0]),
        BLOCK_D=block_d,
        **constants,
    )
    return y
