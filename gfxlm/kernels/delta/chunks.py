"""The gated delta rule 64 steps at a time, on matrix cores: a kernel over all chunks at once, and one that walks them.

With U, W, Y and R as `local` has them, and S (Dv, Dk) the state before a chunk, the walk is: Y += R Sᵀ, and
S = exp(G_end) S + (exp(G_end - G) (U - W Sᵀ))ᵀ K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.batch import Batch
from gfxlm.kernels.delta.local import chunk_local_kernel
from gfxlm.kernels.delta.rows import CHUNK, Chunks, Sequences
from gfxlm.kernels.delta.tables import tuned
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def chunk_walk_kernel(
    p_k,  # (N, Hk, Dk)
    p_w,  # (N, Hv, Dk)
    p_r,  # (N, Hv, Dk)
    p_u,  # (N, Hv, Dv)
    p_y,  # (N, Hv, Dv)
    p_log,  # fp32 (N, Hv)
    p_spans,  # int32 (sequences, 2)
    p_slots,  # int64 (N,), or None: sequence i owns slot i
    p_positions,  # int64 (N,), or None: every sequence continues its state
    p_state,  # fp32 (slots, Hv, Dv, Dk)
    stride_k,
    ratio: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    v_heads: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_V values of one head, over the chunks of one sequence. The state stays in registers, transposed."""
    i_v = tl.program_id(0) % tl.cdiv(v_dim, BLOCK_V)
    i_head = tl.program_id(0) // tl.cdiv(v_dim, BLOCK_V)
    i_span = tl.program_id(1)
    first = tl.load(p_spans + 2 * i_span)
    stop = tl.load(p_spans + 2 * i_span + 1)
    slot = i_span.to(tl.int64) if p_slots is None else tl.load(p_slots + first)
    kept = tl.where((slot >= 0) & (stop > first), v_dim, 0)  # of the state's rows: none where all is padding
    carried = kept if p_positions is None else tl.where(tl.load(p_positions + first) > 0, kept, 0)
    dtype: tl.constexpr = p_y.dtype.element_ty
    o_t = tl.arange(0, CHUNK)
    o_k = tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k = o_k < k_dim
    m_v = o_v < v_dim
    p_s = p_state + (slot * v_heads + i_head) * (v_dim * k_dim) + o_v[None, :] * k_dim + o_k[:, None]
    b_s = tl.load(p_s, mask=m_k[:, None] & (o_v < carried)[None, :], other=0.0)  # (BLOCK_K, BLOCK_V)
    p_k += (i_head // ratio) * k_dim
    for row in tl.range(first, stop, CHUNK, num_stages=STAGES):
        m_t = row + o_t < stop
        o_row = (row + o_t).to(tl.int64)
        o_head = o_row * v_heads + i_head
        m_wide = m_t[:, None] & m_k[None, :]
        o_wide = o_head[:, None] * k_dim + o_k[None, :]
        m_u = m_t[:, None] & m_v[None, :]
        o_u = o_head[:, None] * v_dim + o_v[None, :]
        b_half = b_s.to(dtype)
        b_w = tl.load(p_w + o_wide, mask=m_wide, other=0.0)  # (CHUNK, BLOCK_K)
        b_u = tl.load(p_u + o_u, mask=m_u, other=0.0).to(tl.float32)  # (CHUNK, BLOCK_V)
        b_u -= tl.dot(b_w, b_half)
        b_r = tl.load(p_r + o_wide, mask=m_wide, other=0.0)
        b_y = tl.load(p_y + o_u, mask=m_u, other=0.0).to(tl.float32)
        b_y += tl.dot(b_r, b_half)
        tl.store(p_y + o_u, b_y.to(dtype), mask=m_u)
        end = tl.load(p_log + (tl.minimum(row + CHUNK, stop) - 1).to(tl.int64) * v_heads + i_head)
        # A row that is not there has no correction, but its decay would be infinite where the chunk's is zero.
        b_left = tl.where(m_t, tl.exp2(end - tl.load(p_log + o_head, mask=m_t, other=0.0)), 0.0)
        b_k = tl.load(p_k + o_row[:, None] * stride_k + o_k[None, :], mask=m_wide, other=0.0)
        b_s = tl.dot(tl.trans(b_k), (b_left[:, None] * b_u).to(dtype), b_s * tl.exp2(end))
    tl.store(p_s, b_s, mask=m_k[:, None] & (o_v < kept)[None, :])


def delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: Batch,
    slots: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """As `delta_recurrent` for q, k and v of one half type, gamma and beta fp32 (N, Hv), Dk <= 128: y in that type.

    What meets the state is rounded to the half type once; the state itself stays fp32.
    """
    rows, v_heads, v_dim = v.shape
    k_dim, device = q.shape[2], v.device
    w, r = torch.empty(2, rows, v_heads, k_dim, dtype=v.dtype, device=device).unbind()
    u, y = torch.empty(2, rows, v_heads, v_dim, dtype=v.dtype, device=device).unbind()
    log = torch.empty(rows, v_heads, device=device)
    chunks = batch.table(Chunks())
    sizes = {"ratio": v_heads // q.shape[1], "k_dim": k_dim, "v_dim": v_dim, "v_heads": v_heads, "CHUNK": CHUNK}
    constants, options = tuned("delta_local", device, k_dim=k_dim, v_dim=v_dim)
    launch(
        chunk_local_kernel,
        (v_heads, len(chunks)),
        *(q, k, v, gamma, beta, chunks, w, r, u, y, log),
        *(q.stride(0), k.stride(0), v.stride(0)),
        options=options,
        LEVELS=CHUNK.bit_length() - 1,
        **sizes,
        **constants,
    )
    constants, options = tuned("delta_walk", device, k_dim=k_dim, v_dim=v_dim)
    launch(
        chunk_walk_kernel,
        (cdiv(v_dim, constants["BLOCK_V"]) * v_heads, batch.sequences),
        *(k, w, r, u, y, log, batch.table(Sequences()), slots, positions, state, k.stride(0)),
        options=options,
        BLOCK_K=max(16, next_power_of_2(k_dim)),
        **sizes,
        **constants,
    )
    return y
