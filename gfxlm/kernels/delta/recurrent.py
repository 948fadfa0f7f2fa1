"""The gated delta rule as written, a step after the other: any type, decay per head or per key feature, all fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.batch import Batch
from gfxlm.kernels.delta.rows import Sequences
from gfxlm.kernels.delta.tables import tuned
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def recurrent_kernel(
    p_q,  # (N, Hk, Dk)
    p_k,  # (N, Hk, Dk)
    p_v,  # (N, Hv, Dv)
    p_gamma,  # (N, Hv) or, per key feature, (N, Hv, Dk)
    p_beta,  # (N, Hv)
    p_spans,  # int32 (sequences, 2)
    p_slots,  # int64 (N,), or None: sequence i owns slot i
    p_positions,  # int64 (N,), or None: every sequence continues its state
    p_state,  # fp32 (slots, Hv, Dv, Dk)
    p_y,  # (N, Hv, Dv)
    stride_q,
    stride_k,
    stride_v,
    ratio: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    v_heads: tl.constexpr,
    per_feature: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_V values of one head, over one whole sequence."""
    i_v = tl.program_id(0) % tl.cdiv(v_dim, BLOCK_V)
    i_head = tl.program_id(0) // tl.cdiv(v_dim, BLOCK_V)
    i_span = tl.program_id(1)
    first = tl.load(p_spans + 2 * i_span)
    stop = tl.load(p_spans + 2 * i_span + 1)
    slot = i_span.to(tl.int64) if p_slots is None else tl.load(p_slots + first)
    kept = tl.where((slot >= 0) & (stop > first), v_dim, 0)  # of the state's rows: none where all is padding
    carried = kept if p_positions is None else tl.where(tl.load(p_positions + first) > 0, kept, 0)
    o_k = tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k = o_k < k_dim
    m_v = o_v < v_dim
    p_s = p_state + (slot * v_heads + i_head) * (v_dim * k_dim) + o_v[:, None] * k_dim + o_k[None, :]
    b_s = tl.load(p_s, mask=(o_v < carried)[:, None] & m_k[None, :], other=0.0)  # (BLOCK_V, BLOCK_K)
    i_key = i_head // ratio
    for row in range(first, stop):
        i_row = tl.cast(row, tl.int64)
        b_q = tl.load(p_q + i_row * stride_q + i_key * k_dim + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + i_row * stride_k + i_key * k_dim + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + i_row * stride_v + i_head * v_dim + o_v, mask=m_v, other=0.0).to(tl.float32)
        beta = tl.load(p_beta + i_row * v_heads + i_head).to(tl.float32)
        if per_feature:
            o_gamma = (i_row * v_heads + i_head) * k_dim + o_k
            b_s *= tl.load(p_gamma + o_gamma, mask=m_k, other=0.0).to(tl.float32)[None, :]
        else:
            b_s *= tl.load(p_gamma + i_row * v_heads + i_head).to(tl.float32)
        b_delta = beta * (b_v - tl.sum(b_s * b_k[None, :], 1))
        b_s += b_delta[:, None] * b_k[None, :]
        b_y = tl.sum(b_s * b_q[None, :], 1)
        tl.store(p_y + (i_row * v_heads + i_head) * v_dim + o_v, b_y.to(p_y.dtype.element_ty), mask=m_v)
    tl.store(p_s, b_s, mask=(o_v < kept)[:, None] & m_k[None, :])


def delta_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: Batch,
    dtype: torch.dtype,
    slots: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Sequences laid end to end: y (N, Hv, Dv) of type `dtype`, the state's slots updated in place.

    q and k are (N, Hk, Dk) and v (N, Hv, Dv), a row's heads side by side; gamma (N, Hv) or (N, Hv, Dk) and beta (N, Hv)
    contiguous; state fp32 (slots, Hv, Dv, Dk). Without `slots` (N,) sequence i has slot i. With `positions` (N,) a
    sequence whose first is 0 starts from zeros.
    """
    rows, v_heads, v_dim = v.shape
    k_dim = q.shape[2]
    y = torch.empty(rows, v_heads, v_dim, dtype=dtype, device=v.device)
    constants, options = tuned("delta_recurrent", v.device, k_dim=k_dim, v_dim=v_dim)
    launch(
        recurrent_kernel,
        (cdiv(v_dim, constants["BLOCK_V"]) * v_heads, batch.sequences),
        q,
        k,
        v,
        gamma,
        beta,
        batch.table(Sequences()),
        slots,
        positions,
        state,
        y,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        options=options,
        ratio=v_heads // q.shape[1],
        k_dim=k_dim,
        v_dim=v_dim,
        v_heads=v_heads,
        per_feature=gamma.ndim == 3,
        BLOCK_K=next_power_of_2(k_dim),
        **constants,
    )
    return y
