"""Gated delta net (arXiv 2412.06464): linear attention whose state forgets and is corrected."""

import torch
from torch import Tensor

from gfxlm.nn.cache import RecurrentCache
from gfxlm.nn.context import Context
from gfxlm.nn.linear import Linear, MergedLinear
from gfxlm.nn.module import Module, join
from gfxlm.ops import DeltaWeights, gated_delta_mixer
from gfxlm.weights.source import WeightSource


class GatedDeltaNet(Module):
    """Projections, a short causal convolution, the gated delta rule, and a gated norm.

    Rows of in_proj_qkvz and in_proj_ba are grouped by key head: [q | k | v of its value heads | their z], [b | a].
    """

    conv_weight: Tensor  # (kernel, C)
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
        self.conv_weight = stored.squeeze(-1).mT.contiguous()
        self.A_log = source.tensor(join(path, "A_log"), (self.v_heads,), torch.float32)
        self.dt_bias = source.tensor(join(path, "dt_bias"), (self.v_heads,), torch.float32)
        self.norm_weight = source.tensor(join(path, "norm.weight"), (self.v_dim,))

    def forward(
        self, x: Tensor, context: Context, cache: RecurrentCache, residual: Tensor | None = None
    ) -> Tensor:  # (N, hidden) -> (N, hidden), plus `residual`
        qkvz, ba = self.in_proj(x)
        weights = DeltaWeights(self.conv_weight, self.A_log, self.dt_bias, self.norm_weight, self.eps, self.k_heads)
        y = gated_delta_mixer(qkvz, ba, weights, context.positions, context.slots, cache.conv, cache.state)
        out: Tensor = self.out_proj(y, residual)
        return out
