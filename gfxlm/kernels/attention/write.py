"""From a q, k and v product to the query and the cache: norm of each head, rope and quantisation in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.attention.put import put
from gfxlm.kernels.attention.store import Quantized, Store, strides
from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config


@triton.jit
def _normed(p_rows, o_d, m, p_weight, b_scale, D: tl.constexpr, normed: tl.constexpr):
    """Features o_d of rows as fp32; rounded to their type before the weight and after it, as everywhere."""
    b_x = tl.load(p_rows + o_d[None, :], mask=m, other=0.0)
    if not normed:
        return b_x.to(tl.float32)
    else:
        b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_n = (b_x.to(tl.float32) * b_scale[:, None]).to(b_x.dtype).to(tl.float32)
        return (b_n * b_weight[None, :]).to(b_x.dtype).to(tl.float32)


@triton.jit
def _turned(
    p_rows, m_rows, o_token, p_weight, p_cos, p_sin,
    eps: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, rotary: tl.constexpr, traditional: tl.constexpr,
    normed: tl.constexpr,
):  # fmt: skip
    """Rows (BLOCK_R, BLOCK_D) as fp32: normed, and their first `rotary` features turned."""
    o_d = tl.arange(0, BLOCK_D)
    m = m_rows[:, None] & (o_d < D)[None, :]
    b_scale = tl.zeros([m_rows.shape[0]], tl.float32)
    if normed:
        b_x = tl.load(p_rows + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        mean = tl.sum(b_x * b_x, 1) / D
        b_scale = tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    b_x = _normed(p_rows, o_d, m, p_weight, b_scale, D, normed)
    if rotary == 0:
        return b_x
    else:
        half: tl.constexpr = rotary // 2
        if traditional:
            o_pair, o_other, is_first = o_d // 2, o_d ^ 1, o_d % 2 == 0
        else:
            o_pair, is_first = o_d % half, o_d < half
            o_other = tl.where(is_first, o_d + half, o_d - half)
        # The partner is read again, from the cache nearby: registers cannot be addressed.
        m_turn = m_rows[:, None] & (o_d < rotary)[None, :]
        b_other = _normed(p_rows, o_other, m_turn, p_weight, b_scale, D, normed)
        o_angle = o_token[:, None] * half + o_pair[None, :]
        b_cos = tl.load(p_cos + o_angle, mask=m_turn, other=1.0)
        b_sin = tl.load(p_sin + o_angle, mask=m_turn, other=0.0)
        return b_x * b_cos + tl.where(is_first[None, :], -b_other, b_other) * b_sin


@triton.jit
def _place(p_slots, p_positions, p_pages, n_pages, o_token, m_rows, page_size: tl.constexpr):
    """Slot (or page) and key of each row, int64, and which rows have a slot."""
    slot = tl.load(p_slots + o_token, mask=m_rows, other=-1)
    key = tl.load(p_positions + o_token, mask=m_rows, other=0)
    m_rows = m_rows & (slot >= 0)
    if page_size > 0:
        slot = tl.load(p_pages + slot * n_pages + key // page_size, mask=m_rows, other=0).to(tl.int64)
        key = key % page_size
    return slot, key, m_rows


@triton.jit
def qkv_kernel(
    p_q,
    p_k,
    p_v,
    p_out,  # (N, q_heads, D)
    p_keys,
    p_values,
    p_key_scales,
    p_value_scales,
    p_q_weight,
    p_k_weight,
    p_cos,  # fp32 (N, rotary / 2)
    p_sin,
    p_positions,
    p_slots,
    p_pages,
    N,
    n_pages,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_keys_slot,
    stride_keys_key,
    stride_keys_head,
    stride_values_slot,
    stride_values_key,
    stride_values_head,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    eps: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    rotary: tl.constexpr,
    traditional: tl.constexpr,
    normed: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    page_size: tl.constexpr,
    early: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R pairs of row and head: first those of q, then those of k, then those of v."""
    before_the_next(early)
    after_the_last(early)
    q_blocks, kv_blocks = tl.cdiv(N * q_heads, BLOCK_R), tl.cdiv(N * kv_heads, BLOCK_R)
    i_block = tl.program_id(0)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    if i_block < q_blocks:
        o_r += i_block.to(tl.int64) * BLOCK_R
        heads: tl.constexpr = max(q_heads, 1)
        o_token, o_head, m_rows = o_r // heads, o_r % heads, o_r < N * q_heads
        p_rows = p_q + (o_token * stride_q_row + o_head * stride_q_head)[:, None]
        b_q = _turned(
            p_rows, m_rows, o_token, p_q_weight, p_cos, p_sin, eps, D, BLOCK_D, rotary, traditional, normed
        )  # fmt: skip
        o_d = tl.arange(0, BLOCK_D)
        m = m_rows[:, None] & (o_d < D)[None, :]
        tl.store(p_out + o_r[:, None] * D + o_d[None, :], b_q.to(p_out.dtype.element_ty), mask=m)
    elif i_block < q_blocks + kv_blocks:
        o_r += (i_block - q_blocks).to(tl.int64) * BLOCK_R
        o_token, o_head, m_rows = o_r // kv_heads, o_r % kv_heads, o_r < N * kv_heads
        p_rows = p_k + (o_token * stride_k_row + o_head * stride_k_head)[:, None]
        b_k = _turned(
            p_rows, m_rows, o_token, p_k_weight, p_cos, p_sin, eps, D, BLOCK_D, rotary, traditional, normed
        )  # fmt: skip
        slot, key, m_rows = _place(p_slots, p_positions, p_pages, n_pages, o_token, m_rows, page_size)
        o_store = slot * stride_keys_slot + key * stride_keys_key + o_head * stride_keys_head
        put(p_keys, p_key_scales, o_store, m_rows, b_k.to(p_k.dtype.element_ty), D, BLOCK_D, bits, group_size)
    else:
        o_r += (i_block - q_blocks - kv_blocks).to(tl.int64) * BLOCK_R
        o_token, o_head, m_rows = o_r // kv_heads, o_r % kv_heads, o_r < N * kv_heads
        p_rows = p_v + (o_token * stride_v_row + o_head * stride_v_head)[:, None]
        o_d = tl.arange(0, BLOCK_DV)
        b_v = tl.load(p_rows + o_d[None, :], mask=m_rows[:, None] & (o_d < DV)[None, :], other=0.0)
        slot, key, m_rows = _place(p_slots, p_positions, p_pages, n_pages, o_token, m_rows, page_size)
        o_store = slot * stride_values_slot + key * stride_values_key + o_head * stride_values_head
        put(p_values, p_value_scales, o_store, m_rows, b_v, DV, BLOCK_DV, bits, group_size)


def write(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    keys: Store,
    values: Store,
    positions: Tensor,
    slots: Tensor,
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    angles: tuple[Tensor, Tensor] | None = None,
    traditional: bool = False,
    pages: Tensor | None = None,
) -> Tensor | None:
    """Norm and turn q and k, store k and v at their slots and positions; returns q, contiguous (N, Hq, D).

    q is (N, Hq, D), k (N, Hkv, D) and v (N, Hkv, DV), features side by side, of the stores' type; positions and slots
    are int64 (N,), contiguous; rows with a negative slot are not stored. weights are of the norms of q and k, (D,)
    each; angles are cosine and sine, fp32 (N, rotary / 2), contiguous. With `pages`, int32 (slots, n), a slot of the
    stores is a page.
    """
    n, kv_heads, head_size = k.shape
    q_heads = 0 if q is None else q.shape[1]
    out = None if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if n == 0:
        return out
    codes = [store.codes if isinstance(store, Quantized) else store for store in (keys, values)]
    scales = [store.scales if isinstance(store, Quantized) else store for store in (keys, values)]
    rows = k if q is None else q
    sizes = config("qkv", k.device, rows=n * max(q_heads, kv_heads), head_size=head_size)
    block = sizes["BLOCK_R"]
    launch(
        qkv_kernel,
        (cdiv(n * q_heads, block) + 2 * cdiv(n * kv_heads, block),),
        rows, k, v, k if out is None else out, *codes, *scales, *(weights or (None, None)), *(angles or (None, None)),
        positions, slots, pages,
        n, 0 if pages is None else pages.stride(0),
        *rows.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *strides(keys), *strides(values),
        options=sizes["options"],
        q_heads=q_heads,
        kv_heads=kv_heads,
        eps=eps,
        D=head_size,
        DV=v.shape[2],
        rotary=0 if angles is None else 2 * angles[0].shape[-1],
        traditional=traditional,
        normed=weights is not None,
        bits=keys.bits if isinstance(keys, Quantized) else 16,
        group_size=keys.group_size if isinstance(keys, Quantized) else 1,
        page_size=0 if pages is None else keys.shape[1],
        BLOCK_D=next_power_of_2(head_size),
        BLOCK_DV=next_power_of_2(v.shape[2]),
        BLOCK_R=block,
    )  # fmt: skip
    return out
