"""Mixture of experts: routing, and the experts' gated MLPs."""

import torch
from torch import Tensor

from gfxlm.ops.activation import swiglu
from gfxlm.ops.matrix import MatrixStack


def route(logits: Tensor, top_k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Choose experts: softmax over all in fp32, the `top_k` best, their scores rescaled to 1 if `normalize`.

    logits (T, E); returns expert indices int64 and scores fp32, (T, top_k) each.
    """
    scores, experts = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    return experts, scores / scores.sum(-1, keepdim=True) if normalize else scores


def expert_mlp(x: Tensor, experts: Tensor, scores: Tensor, gate_up: MatrixStack, down: MatrixStack) -> Tensor:
    """`sum_k scores_k * down_k(silu(gate_k x) * up_k x)` over each token's experts; every expert is read once.

    x (T, D), experts and scores (T, k); `gate_up` has gate rows first. Returns (T, D) in x's dtype; the sum over k is
    in fp32 and in the order of `experts`, so it does not depend on what other tokens chose.
    """
    tokens, k = experts.shape
    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten()).tolist()
    routed = torch.empty(tokens * k, x.shape[-1], dtype=x.dtype, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = order[start : start + count]
            gate, up = gate_up.matrix(expert).matmul(x[rows // k]).chunk(2, dim=-1)
            routed[rows] = down.matrix(expert).matmul(swiglu(gate, up))
            start += count
    return (routed.view(tokens, k, x.shape[-1]).float() * scores[..., None]).sum(1).to(x.dtype)
