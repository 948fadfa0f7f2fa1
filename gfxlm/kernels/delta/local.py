"""What a chunk of the gated delta rule gives before the state is known: all chunks at once, on matrix cores.

With G the running log decay of a chunk, ratio[i, j] = exp(G_i - G_j), T = (I + tril(beta ratio K Kᵀ, -1))⁻¹ beta and
A = tril(ratio Q Kᵀ), these are U = T V, W = T exp(G) K, Y = A T V and R = exp(G) Q - A T exp(G) K.
"""

import triton
import triton.language as tl


@triton.jit
def _products(p_a, p_b, m_row, size: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """All rows of a with all of b: (ROWS, ROWS)."""
    products = tl.zeros([ROWS, ROWS], tl.float32)
    for start in range(0, size, BLOCK):
        o_d = start + tl.arange(0, BLOCK)[None, :]
        mask = m_row & (o_d < size)
        b_a = tl.load(p_a + o_d, mask=mask, other=0.0)
        b_b = tl.load(p_b + o_d, mask=mask, other=0.0)
        products = tl.dot(b_a, b_b.T, products)
    return products


@triton.jit
def _inverse(b_l, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """(I + tril(b_l, -1))⁻¹ of a lower b_l (ROWS, ROWS): blocks along the diagonal, joined in pairs until one is left.

    Products of fp16 numbers: for keys of length one and beta <= 2 neither side can exceed 2, and eleven bits are kept.
    """
    apart = tl.arange(0, ROWS)[:, None] ^ tl.arange(0, ROWS)[None, :]
    b_x = tl.where(apart == 0, 1.0, tl.where(apart == 1, -b_l, 0.0))
    b_l = b_l.to(tl.float16)
    for level in range(1, LEVELS):
        b_half = b_x.to(tl.float16)
        # Where rows and columns are neighbouring blocks of 2^level.
        b_left = tl.dot(tl.where(apart >> level == 1, b_l, 0.0), b_half)
        b_x -= tl.dot(b_half, b_left.to(tl.float16))
    return b_x


@triton.jit
def chunk_local_kernel(
    p_q,  # (N, Hk, Dk)
    p_k,  # (N, Hk, Dk)
    p_v,  # (N, Hv, Dv)
    p_gamma,  # fp32 (N, Hv)
    p_beta,  # fp32 (N, Hv)
    p_chunks,  # int32 (chunks, 3)
    p_w,  # (N, Hv, Dk)
    p_r,  # (N, Hv, Dk)
    p_u,  # (N, Hv, Dv)
    p_y,  # (N, Hv, Dv)
    p_log,  # fp32 (N, Hv): log2 of the decay since the chunk's start
    stride_q,
    stride_k,
    stride_v,
    ratio: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    v_heads: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least 64 on Hopper, where Triton 3.6 gets narrower products with four warps wrong
):
    """One head of one chunk."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    i_head = tl.program_id(0)
    row = tl.load(p_chunks + tl.program_id(1) * 3)
    stop = tl.load(p_chunks + tl.program_id(1) * 3 + 2)
    o_t = tl.arange(0, CHUNK)
    m_t = row + o_t < stop
    m_row = m_t[:, None]
    o_row = (row + o_t).to(tl.int64)
    p_key = p_k + (i_head // ratio) * k_dim + o_row[:, None] * stride_k
    p_query = p_q + (i_head // ratio) * k_dim + o_row[:, None] * stride_q

    o_gate = o_row * v_heads + i_head
    # 2^-80 stands for zero: sums of 64 of them still leave differences of mild decays their digits.
    b_log = tl.cumsum(tl.log2(tl.maximum(tl.load(p_gamma + o_gate, mask=m_t, other=1.0), 2.0**-80)), 0)
    b_beta = tl.load(p_beta + o_gate, mask=m_t, other=0.0)
    tl.store(p_log + o_gate, b_log, mask=m_t)
    b_ratio = tl.exp2(tl.where(o_t[:, None] >= o_t[None, :], b_log[:, None] - b_log[None, :], -1000.0))

    b_l = b_beta[:, None] * b_ratio * _products(p_key, p_key, m_row, k_dim, CHUNK, BLOCK_D)
    b_t = _inverse(b_l, CHUNK, LEVELS) * b_beta[None, :]
    b_a = b_ratio * _products(p_query, p_key, m_row, k_dim, CHUNK, BLOCK_D)
    b_at = tl.dot(b_a.to(dtype), b_t.to(dtype))

    o_out = o_gate[:, None] * v_dim
    b_t_half, b_at_half = b_t.to(dtype), b_at.to(dtype)
    for start in range(0, v_dim, BLOCK_D):
        o_v = start + tl.arange(0, BLOCK_D)[None, :]
        m_v = m_row & (o_v < v_dim)
        b_v = tl.load(p_v + i_head * v_dim + o_row[:, None] * stride_v + o_v, mask=m_v, other=0.0)
        tl.store(p_u + o_out + o_v, tl.dot(b_t_half, b_v).to(dtype), mask=m_v)
        tl.store(p_y + o_out + o_v, tl.dot(b_at_half, b_v).to(dtype), mask=m_v)

    o_out = o_gate[:, None] * k_dim
    b_left = tl.exp2(b_log)
    b_t_half, b_at_half = (b_t * b_left[None, :]).to(dtype), (b_at * b_left[None, :]).to(dtype)
    for start in range(0, k_dim, BLOCK_D):
        o_k = start + tl.arange(0, BLOCK_D)[None, :]
        m_k = m_row & (o_k < k_dim)
        b_k = tl.load(p_key + o_k, mask=m_k, other=0.0)
        tl.store(p_w + o_out + o_k, tl.dot(b_t_half, b_k).to(dtype), mask=m_k)
        b_q = tl.load(p_query + o_k, mask=m_k, other=0.0).to(tl.float32)
        tl.store(p_r + o_out + o_k, (b_left[:, None] * b_q - tl.dot(b_at_half, b_k)).to(dtype), mask=m_k)
