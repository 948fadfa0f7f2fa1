"""Grouped-query attention over a cache."""

import torch
from torch import Tensor

from gfxlm.nn.cache import KVCache
from gfxlm.nn.context import Context
from gfxlm.nn.linear import Linear, MergedLinear
from gfxlm.nn.module import Module
from gfxlm.nn.norm import RMSNorm
from gfxlm.ops import cached_attention, rotate


class Attention(Module):
    """q, k and v in one product; optional norms of q and k per head, window, and sigmoid gate on the output.

    With `gated`, q_proj has for each head its query and then its gate.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        gated: bool = False,
        window: int | None = None,
        traditional_rope: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.gated = gated
        self.window = window
        self.traditional_rope = traditional_rope
        q_size, kv_size = heads * head_dim * (2 if gated else 1), kv_heads * head_dim
        self.qkv_proj = MergedLinear(
            hidden_size, {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}, bias=qkv_bias
        )
        self.o_proj = Linear(heads * head_dim, hidden_size, bias=output_bias)
        self.has_qk_norm = qk_norm_eps is not None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps)

    def forward(self, x: Tensor, context: Context, cache: KVCache) -> Tensor:  # (N, hidden) -> (N, hidden)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t, heads in zip(self.qkv_proj(x), self._head_counts, strict=True))
        if self.gated:
            q, gate = q.chunk(2, dim=-1)  # (N, H, D) each
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(t, context.cos, context.sin, traditional=self.traditional_rope) for t in (q, k))
        cache.write(k, v, context.positions, context.slots)
        out = cached_attention(
            q,
            cache.keys,
            cache.values,
            context.positions,
            context.slots,
            scale=self.head_dim**-0.5,
            window=self.window,
        )
        if self.gated:
            out = (out.float() * torch.sigmoid(gate.float())).to(out.dtype)
        return self.o_proj(out.flatten(-2))

    @property
    def _head_counts(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.kv_heads
