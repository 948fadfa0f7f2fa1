"""The router: softmax over all experts, the best of them and their scores, one program a token.

A logit and the number of its expert share one integer key, so that a single integer maximum finds the best expert left
and breaks ties for the lower number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.layout import adjacent
from gfxlm.kernels.sizes import next_power_of_2
from gfxlm.kernels.tuning import config

# Low bits that are zero in the fp32 of a narrower float: room for an expert's number in a 32-bit key.
_FREE_BITS = {torch.bfloat16: 16, torch.float16: 13}


@triton.jit
def _keys(logits, o_e, index_bits: tl.constexpr):
    """Integers in the order of (logit, -expert): NaN above all, both zeros equal."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(logits == logits, ordered, 0x7FFFFFFF)
    if index_bits == 32:
        return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - o_e.to(tl.int64))
    else:
        last: tl.constexpr = (1 << index_bits) - 1
        return (ordered & ~last) | (last - o_e)


@triton.jit
def route_kernel(
    p_logits,  # (T, E), rows strided
    p_slots,  # int64 (T,), or None
    p_experts,  # int64 (T, TOP_K)
    p_scores,  # fp32 (T, TOP_K)
    stride_t,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    normalize: tl.constexpr,
    index_bits: tl.constexpr,
    early: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token's best experts and their scores."""
    before_the_next(early)
    after_the_last(early)
    t = tl.program_id(0).to(tl.int64)
    p_row = p_logits + t * stride_t
    o_e = tl.arange(0, BLOCK_E)
    o_k = tl.arange(0, BLOCK_K)
    m_e = o_e < E
    b_logits = tl.load(p_row + o_e, mask=m_e, other=float("-inf")).to(tl.float32)
    peak = tl.max(b_logits, 0)
    last: tl.constexpr = (1 << index_bits) - 1
    taken: tl.constexpr = -(1 << 63) if index_bits == 32 else -(1 << 31)
    b_keys = tl.where(m_e, _keys(b_logits, o_e, index_bits), taken)
    b_experts = tl.zeros([BLOCK_K], tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.max(b_keys, 0)
        b_keys = tl.where(b_keys == best, taken, b_keys)
        b_experts = tl.where(o_k == i, (last - (best & last)).to(tl.int32), b_experts)
    m_k = o_k < TOP_K
    b_scores = tl.exp(tl.load(p_row + b_experts, mask=m_k, other=float("-inf")).to(tl.float32) - peak)
    b_scores = tl.where(m_k, b_scores, 0.0)
    b_all = b_scores if normalize else tl.where(m_e, tl.exp(b_logits - peak), 0.0)
    if p_slots is not None:
        b_experts = tl.where(tl.load(p_slots + t) < 0, -1, b_experts)
    o_out = t * TOP_K + o_k
    tl.store(p_experts + o_out, b_experts.to(tl.int64), mask=m_k)
    tl.store(p_scores + o_out, b_scores / tl.sum(b_all, 0), mask=m_k)


def route(logits: Tensor, top_k: int, normalize: bool, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Expert indices int64 and scores fp32, (T, top_k) each, of floating logits (T, E) with 1 <= top_k <= E.

    Best first; of equal logits the lower index first. Scores are a softmax over all experts in fp32, divided by their
    sum if `normalize`. NaN counts as the largest; then, as after infinity, scores are NaN and indices still in range.
    A token whose slot, int64 (T,), is negative is padding and has experts -1.
    """
    tokens, n_experts = logits.shape
    experts = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    scores = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens == 0:
        return experts, scores
    logits = adjacent(logits)
    free = _FREE_BITS.get(logits.dtype, 0)
    launch(
        route_kernel,
        (tokens,),
        logits,
        None if slots is None else slots.contiguous(),
        experts,
        scores,
        logits.stride(0),
        E=n_experts,
        TOP_K=top_k,
        normalize=normalize,
        index_bits=free if n_experts <= 1 << free and free else 32,
        BLOCK_E=next_power_of_2(n_experts),
        BLOCK_K=next_power_of_2(top_k),
        options=config("router", logits.device, experts=n_experts),
    )
    return experts, scores
