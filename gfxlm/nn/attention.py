"""Grouped-query attention over a cache."""

import torch
from torch import Tensor

from gfxlm.nn.cache import KVCache, QuantizedKVCache
from gfxlm.nn.context import Context
from gfxlm.nn.linear import Linear, MergedLinear
from gfxlm.nn.module import Module
from gfxlm.nn.norm import RMSNorm
from gfxlm.nn.ring import Turned, Unrolling
from gfxlm.ops import cached_attention, scaled_dot_product_attention
from gfxlm.ops.kv import read, write_qkv
from gfxlm.ops.ragged import Slots


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
        rows = context.turned or Turned(context.positions, context.positions, context.slots)
        if rows.unrollings:
            out = torch.zeros_like(q)
            for part in rows.unrollings:
                out[part.rows] = self._attend_unrolled(q, k, v, context, cache, part)
            out = out if gate is None else (out.float() * torch.sigmoid(gate.float())).to(out.dtype)
        else:
            q = self._store(q, k, v, context.cos, context.sin, cache, rows.places, rows.slots)
            out = cached_attention(
                q,
                cache.keys,
                cache.values,
                rows.last,
                rows.slots,
                scale=self.head_dim**-0.5,
                window=self.window,
                gate=gate,
                pages=cache.table,
            )
        projected: Tensor = self.o_proj(out.flatten(-2), residual)
        return projected

    def _attend_unrolled(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        cache: KVCache | QuantizedKVCache,
        part: Unrolling,
    ) -> Tensor:
        """Attention of one sequence's rows over a ring that they turn: (n, heads, head_dim), before the gate."""
        copy = part.copy(cache)
        q, k, v, cos, sin = (x[part.rows] for x in (q, k, v, context.cos, context.sin))
        q = self._store(q, k, v, cos, sin, copy, part.places, part.slots)
        part.store(copy, cache)
        keys, values = (read(store, 0, 0, store.shape[1]) for store in (copy.keys, copy.values))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, keys, values))
        out = scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=part.mask)
        return out[0].transpose(0, 1)

    def _store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | QuantizedKVCache,
        places: Tensor,
        slots: Slots,
    ) -> Tensor:
        """Norm and turn queries and keys, and store keys and values; returns the queries."""
        return write_qkv(
            q,
            k,
            v,
            cache.keys,
            cache.values,
            places,
            slots,
            cos=cos,
            sin=sin,
            norms=(self.q_norm.weight, self.k_norm.weight) if self.has_qk_norm else None,
            eps=self.q_norm.eps if self.has_qk_norm else 0.0,
            traditional=self.traditional_rope,
            pages=cache.table,
        )

    @property
    def _head_counts(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.kv_heads
