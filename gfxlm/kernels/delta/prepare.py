"""From a projection's rows to what the delta rule reads, convolved, normalised, with gates; and the norm after it."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.batch import Batch
from gfxlm.kernels.delta.formulas import decay, inverse_root, sigmoid, silu
from gfxlm.kernels.delta.rows import CHUNK, Chunks
from gfxlm.kernels.delta.tables import tuned
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def prepare_kernel(
    p_qkvz,  # (N, ...) grouped by key head: [q | k | v of its value heads | their z]
    p_ba,  # (N, ...) grouped by key head: [b | a]
    p_weight,  # (taps, channels)
    p_A_log,  # fp32 (Hv,)
    p_dt_bias,  # fp32 (Hv,)
    p_positions,  # int64 (N,)
    p_slots,  # int64 (N,)
    p_chunks,  # int32 (chunks, 3)
    p_ring,  # (slots, taps, channels)
    p_qkv,  # (N, channels)
    p_gamma,  # fp32 (N, Hv)
    p_beta,  # fp32 (N, Hv)
    stride_qkvz,
    stride_ba,
    k_heads: tl.constexpr,
    ratio: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    taps: tl.constexpr,
    aligned: tl.constexpr,  # divides every head's offset
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_T rows of one head of q, k or v: convolution and SiLU, then l2norm and scale, or the gates."""
    v_heads: tl.constexpr = k_heads * ratio
    channels: tl.constexpr = 2 * k_heads * k_dim + v_heads * v_dim
    group: tl.constexpr = 2 * k_dim + 2 * ratio * v_dim
    i_part = tl.program_id(0)
    i_chunk = tl.program_id(1) // (CHUNK // BLOCK_T)
    row = tl.load(p_chunks + i_chunk * 3) + (tl.program_id(1) % (CHUNK // BLOCK_T)) * BLOCK_T
    first = tl.load(p_chunks + i_chunk * 3 + 1)
    stop = tl.load(p_chunks + i_chunk * 3 + 2)
    is_value = i_part >= 2 * k_heads
    i_head = i_part - 2 * k_heads  # of a value
    source_k = (i_part % k_heads) * group + (i_part // k_heads) * k_dim
    source_v = (i_head // ratio) * group + 2 * k_dim + (i_head % ratio) * v_dim
    channel_v = 2 * k_heads * k_dim + i_head * v_dim
    p_qkvz += tl.multiple_of(tl.where(is_value, source_v, source_k), aligned)
    channel = tl.multiple_of(tl.where(is_value, channel_v, i_part * k_dim), aligned)

    o_row = row + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < tl.where(is_value, v_dim, k_dim)
    m_t = o_row < stop
    b_y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for tap in tl.static_range(taps):
        o_from = o_row - (taps - 1 - tap)
        m_x = (m_t & (o_from >= first))[:, None] & m_d[None, :]
        b_x = tl.load(p_qkvz + o_from[:, None].to(tl.int64) * stride_qkvz + o_d[None, :], mask=m_x, other=0.0)
        b_weight = tl.load(p_weight + tap * channels + channel + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_y += b_x.to(tl.float32) * b_weight[None, :]
    if row == first:
        # Rows before the sequence's first are in the ring; this program alone reads them, and then writes the last.
        position = tl.load(p_positions + first)
        slot = tl.load(p_slots + first)
        p_ring += slot * (taps * channels) + channel
        size = tl.where(slot >= 0, tl.where(is_value, v_dim, k_dim), 0)
        for tap in tl.static_range(taps - 1):
            o_from = o_row - first - (taps - 1 - tap)
            m_old = (m_t & (o_from < 0) & (position + o_from >= 0))[:, None] & (o_d < size)[None, :]
            o_old = ((position + o_from) % taps)[:, None] * channels + o_d[None, :]
            b_old = tl.load(p_ring + o_old, mask=m_old, other=0.0)
            b_weight = tl.load(p_weight + tap * channels + channel + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_y += b_old.to(tl.float32) * b_weight[None, :]
        tl.debug_barrier()
        for back in tl.static_range(1, taps):
            last = stop - back
            m_last = o_d < tl.where(last >= first, size, 0)
            b_last = tl.load(p_qkvz + last.to(tl.int64) * stride_qkvz + o_d, mask=m_last, other=0.0)
            tl.store(p_ring + ((position + last - first) % taps) * channels + o_d, b_last, mask=m_last)
    b_y = silu(b_y)
    o_long = o_row.to(tl.int64)
    if is_value:
        p_gates = p_ba + o_long * stride_ba + (i_head // ratio) * (2 * ratio) + i_head % ratio
        b_beta = sigmoid(tl.load(p_gates, mask=m_t, other=0.0).to(tl.float32))
        b_a = tl.load(p_gates + ratio, mask=m_t, other=0.0).to(tl.float32)
        b_gamma = decay(tl.load(p_A_log + i_head), b_a, tl.load(p_dt_bias + i_head))
        tl.store(p_beta + o_long * v_heads + i_head, b_beta, mask=m_t)
        tl.store(p_gamma + o_long * v_heads + i_head, b_gamma, mask=m_t)
    else:
        b_y *= inverse_root(tl.sum(b_y * b_y, 1) + 1e-6)[:, None] * tl.where(i_part < k_heads, k_dim**-0.5, 1.0)
    o_y = o_long[:, None] * channels + (channel + o_d)[None, :]
    tl.store(p_qkv + o_y, b_y.to(p_qkv.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


def prepare(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    k_heads: int,
    v_dim: int,
    positions: Tensor,
    slots: Tensor,
    ring: Tensor,
    batch: Batch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences laid end to end: qkv (N, channels) in qkvz's type, gamma and beta fp32 (N, Hv); the ring is updated.

    q and k are normalised, q is scaled by Dk^-1/2. Tensors as `ops.gated_delta_mixer` describes them.
    """
    rows, device, v_heads = qkvz.shape[0], qkvz.device, len(A_log)
    taps, channels = conv_weight.shape
    k_dim = (channels - v_heads * v_dim) // (2 * k_heads)
    qkv = torch.empty(rows, channels, dtype=qkvz.dtype, device=device)
    gamma, beta = torch.empty(2, rows, v_heads, device=device).unbind()
    chunks = batch.table(Chunks())
    constants, options = tuned("delta_prepare", device, k_dim=k_dim, v_dim=v_dim)
    launch(
        prepare_kernel,
        (2 * k_heads + v_heads, len(chunks) * (CHUNK // constants["BLOCK_T"])),
        qkvz,
        ba,
        conv_weight,
        A_log,
        dt_bias,
        positions,
        slots,
        chunks,
        ring,
        qkv,
        gamma,
        beta,
        qkvz.stride(0),
        ba.stride(0),
        options=options,
        k_heads=k_heads,
        ratio=v_heads // k_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        taps=taps,
        aligned=math.gcd(k_dim, v_dim, 16),
        CHUNK=CHUNK,
        BLOCK_D=next_power_of_2(max(k_dim, v_dim)),
        **constants,
    )
    return qkv, gamma, beta


@triton.jit
def gated_norm_kernel(
    p_y,  # (N, Hv, Dv)
    p_qkvz,  # (N, ...) grouped by key head: [q | k | v of its value heads | their z]
    p_norm,  # (Dv,)
    p_out,  # (N, Hv, Dv)
    n_heads,  # N * Hv
    stride_qkvz,
    eps: tl.constexpr,
    k_heads: tl.constexpr,
    ratio: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """RMSNorm of BLOCK_R heads' values, times SiLU of their z."""
    v_heads: tl.constexpr = k_heads * ratio
    group: tl.constexpr = 2 * k_dim + 2 * ratio * v_dim
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_r < n_heads)[:, None] & (o_d < v_dim)[None, :]
    i_head = o_r % v_heads
    o_z = (o_r // v_heads) * stride_qkvz + i_head // ratio * group + 2 * k_dim + (ratio + i_head % ratio) * v_dim
    b_z = tl.load(p_qkvz + o_z[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_y = tl.load(p_y + o_r[:, None] * v_dim + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_norm = tl.load(p_norm + o_d, mask=o_d < v_dim, other=0.0).to(tl.float32)
    b_y *= inverse_root(tl.sum(b_y * b_y, 1) / v_dim + eps)[:, None] * b_norm[None, :] * silu(b_z)
    tl.store(p_out + o_r[:, None] * v_dim + o_d[None, :], b_y.to(p_out.dtype.element_ty), mask=mask)


def gated_norm(y: Tensor, qkvz: Tensor, norm_weight: Tensor, eps: float, k_heads: int, k_dim: int) -> Tensor:
    """rms_norm(y) * norm_weight * silu(z) for y (N, Hv, Dv): (N, Hv * Dv) in qkvz's type. z is a part of qkvz."""
    rows, v_heads, v_dim = y.shape
    out = torch.empty(rows, v_heads * v_dim, dtype=qkvz.dtype, device=y.device)
    constants, options = tuned("delta_norm", y.device, k_dim=k_dim, v_dim=v_dim)
    launch(
        gated_norm_kernel,
        (cdiv(rows * v_heads, constants["BLOCK_R"]),),
        y,
        qkvz,
        norm_weight,
        out,
        rows * v_heads,
        qkvz.stride(0),
        options=options,
        eps=eps,
        k_heads=k_heads,
        ratio=v_heads // k_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        BLOCK_D=next_power_of_2(v_dim),
        **constants,
    )
    return out
