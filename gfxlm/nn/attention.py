"""Grouped-query attention over a cache."""

from torch import Tensor

from gfxlm.nn.cache import KVCache, QuantizedKVCache
from gfxlm.nn.context import Context
from gfxlm.nn.linear import Linear, MergedLinear
from gfxlm.nn.module import Module
from gfxlm.nn.norm import RMSNorm
from gfxlm.ops import cached_attention
from gfxlm.ops.kv import write_qkv


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

    def forward(
        self, x: Tensor, context: Context, cache: KVCache | QuantizedKVCache, residual: Tensor | None = None
    ) -> Tensor:
        """(N, hidden_size) to (N, hidden_size), plus the residual if there is one."""
        q, k, v = (t.unflatten(-1, (heads, -1)) for t, heads in zip(self.qkv_proj(x), self._head_counts, strict=True))
        gate = None
        if self.gated:
            q, gate = q.chunk(2, dim=-1)  # (N, H, D) each
        q = write_qkv(
            q,
            k,
            v,
            cache.keys,
            cache.values,
            context.positions,
            context.slots,
            cos=context.cos,
            sin=context.sin,
            norms=(self.q_norm.weight, self.k_norm.weight) if self.has_qk_norm else None,
            eps=self.q_norm.eps if self.has_qk_norm else 0.0,
            traditional=self.traditional_rope,
        )
        out = cached_attention(
            q,
            cache.keys,
            cache.values,
            context.positions,
            context.slots,
            scale=self.head_dim**-0.5,
            window=self.window,
            gate=gate,
        )
        projected: Tensor = self.o_proj(out.flatten(-2), residual)
        return projected

    @property
    def _head_counts(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.kv_heads
