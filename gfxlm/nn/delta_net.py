"""Gated delta net (arXiv 2412.06464): linear attention whose state forgets and is corrected."""

import torch
from torch import Tensor

from gfxlm.nn.cache import RecurrentCache
from gfxlm.nn.context import Context
from gfxlm.nn.linear import Linear, MergedLinear
from gfxlm.nn.module import Module, join
from gfxlm.ops import causal_conv1d, decay, gated_delta_update, l2_normalize, rms_norm
from gfxlm.ops.ragged import Span
from gfxlm.weights.source import WeightSource


class GatedDeltaNet(Module):
    """Projections, a short causal convolution, the gated delta rule, and a gated norm.

    Rows of in_proj_qkvz and in_proj_ba are grouped by key head: [q | k | v of its value heads | their z], [b | a].
    """

    conv_weight: Tensor  # (C, kernel)
    A_log: Tensor  # fp32 (Hv,)
    dt_bias: Tensor  # fp32 (Hv,)
    norm_weight: Tensor  # (Dv,)

    def __init__(
        self, hidden_size: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int, kernel: int, eps: float
    ) -> None:
        super().__init__()
        self.k_heads, self.v_heads, self.k_dim, self.v_dim = k_heads, v_heads, k_dim, v_dim
        self.kernel, self.eps = kernel, eps
        self.key_size, self.value_size = k_heads * k_dim, v_heads * v_dim
        self.channels = 2 * self.key_size + self.value_size
        parts = {"in_proj_qkvz": 2 * self.key_size + 2 * self.value_size, "in_proj_ba": 2 * v_heads}
        self.in_proj = MergedLinear(hidden_size, parts)
        self.out_proj = Linear(self.value_size, hidden_size)

    def load(self, source: WeightSource, path: str = "") -> None:
        super().load(source, path)
        stored = source.tensor(join(path, "conv1d.weight"), (self.channels, self.kernel, 1))
        self.conv_weight = stored.squeeze(-1).contiguous()
        self.A_log = source.tensor(join(path, "A_log"), (self.v_heads,), torch.float32)
        self.dt_bias = source.tensor(join(path, "dt_bias"), (self.v_heads,), torch.float32)
        self.norm_weight = source.tensor(join(path, "norm.weight"), (self.v_dim,))

    def forward(self, x: Tensor, context: Context, cache: RecurrentCache) -> Tensor:  # (N, hidden) -> (N, hidden)
        qkv, z, b, a = self._project(x)
        beta = torch.sigmoid(b.float())  # (N, Hv)
        gamma = decay(self.A_log, a, self.dt_bias)  # (N, Hv)
        spans = [span for span in context.slots.spans if span.stop > span.start]
        if all(span.stop - span.start == 1 for span in spans):
            # One token a sequence: the batch is the sequences.
            one = [t[:, None] for t in (qkv, gamma, beta)]
            y = self._mix(one, context.positions, context.slots.index, cache)[:, 0]
        else:
            y = torch.cat([self._mix_span(span, [qkv, gamma, beta], context, cache) for span in spans])
        gated = rms_norm(y, self.norm_weight, self.eps) * torch.nn.functional.silu(z.float())
        return self.out_proj(gated.to(x.dtype).flatten(-2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """qkv (N, C) with its channels in the convolution's order, z (N, Hv, Dv), b and a (N, Hv)."""
        qkvz, ba = self.in_proj(x)
        ratio = self.v_heads // self.k_heads
        per_head = qkvz.unflatten(-1, (self.k_heads, -1))
        q, k, v, z = per_head.split([self.k_dim, self.k_dim, ratio * self.v_dim, ratio * self.v_dim], dim=-1)
        b, a = ba.unflatten(-1, (self.k_heads, -1)).chunk(2, dim=-1)  # (N, Hk, Hv / Hk) each
        qkv = torch.cat([t.flatten(-2) for t in (q, k, v)], dim=-1)
        return qkv, z.reshape(-1, self.v_heads, self.v_dim), b.flatten(-2), a.flatten(-2)

    def _mix_span(self, span: Span, inputs: list[Tensor], context: Context, cache: RecurrentCache) -> Tensor:
        first = slice(span.start, span.start + 1)
        sequence = [t[None, span.start : span.stop] for t in inputs]
        return self._mix(sequence, context.positions[first], context.slots.index[first], cache)[0]

    def _mix(self, inputs: list[Tensor], first_positions: Tensor, slots: Tensor, cache: RecurrentCache) -> Tensor:
        """Convolve and recur over sequences of one length, states updated in place.

        `inputs` are qkv (B, T, C), gamma and beta (B, T, Hv); returns fp32 (B, T, Hv, Dv).
        """
        qkv, gamma, beta = inputs
        # A sequence that starts at position 0 starts from nothing, whatever its slot held before.
        started = first_positions > 0  # (B,)
        tail = torch.where(started[:, None, None], cache.conv[slots], 0)
        state = torch.where(started[:, None, None, None], cache.state[slots], 0)
        qkv, tail = causal_conv1d(qkv, self.conv_weight, state=tail, activation="silu")
        q, k, v = qkv.split([self.key_size, self.key_size, self.value_size], dim=-1)
        q, k = (l2_normalize(t.unflatten(-1, (self.k_heads, -1))) for t in (q, k))  # (B, T, Hk, Dk) fp32
        v = v.unflatten(-1, (self.v_heads, -1))  # (B, T, Hv, Dv)
        y, state = gated_delta_update(q * self.k_dim**-0.5, k, v, gamma, beta, state)
        cache.conv.index_copy_(0, slots, tail)
        cache.state.index_copy_(0, slots, state)
        return y
