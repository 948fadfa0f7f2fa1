"""What a model's layers should put out, in float64 on the CPU and by the formulas alone.

Nothing here goes through an operation or a kernel, but for the codes of a quantised matrix. Each formula is written for
an `Arithmetic`, which is exact or rounds: how far the two lie apart is what rounding may do to a layer, and a yardstick
for the layer itself (Monte Carlo arithmetic: Parker, 1997).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.engine.params import SamplingParams
from gfxlm.ops.delta_mixer import DeltaWeights
from gfxlm.ops.quantized import dequantize
from gfxlm.weights.weight import DenseWeight, MergedWeight, PackedWeight, Weight

# Of numbers that lie evenly between a half and one, with either sign: sqrt(7 / 12).
_SPREAD = 0.764

Formula = Callable[["Arithmetic"], Tensor]


def numbers(tensor: Tensor) -> Tensor:
    """float64, on the CPU."""
    return tensor.detach().cpu().double()


def matrix(weight: Weight, rows: Tensor | None = None) -> Tensor:
    """Rows of a matrix (all of them by default), float64 on the CPU, whatever its layout: (n, K)."""
    if isinstance(weight, MergedWeight):
        whole = torch.cat([matrix(part) for part in weight.parts])
        return whole if rows is None else whole[rows]
    if isinstance(weight, DenseWeight):
        return numbers(weight.tensor if rows is None else weight.tensor[rows.to(weight.tensor.device)])
    assert isinstance(weight, PackedWeight)
    q, tensors = weight.quantization, weight.to_mlx()
    if rows is not None:
        # uint32 has no gather in torch: its bits are gathered as int32.
        words = [None if x is None else x.view(torch.int32) if x.dtype == torch.uint32 else x for x in tensors]
        codes, scales, biases = (None if x is None else x[rows.to(x.device)].cpu() for x in words)
        assert codes is not None
        codes = codes.view(torch.uint32)
    else:
        codes, scales, biases = (None if x is None else x.cpu() for x in tensors)
    assert codes is not None
    assert scales is not None
    return dequantize(codes, scales, biases, q.group_size, q.bits, q.mode, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class DeltaInputs:
    """What a gated delta net's mixer is given, float64: rows (N, ...) from position `first` on, and its slot."""

    qkvz: Tensor
    ba: Tensor
    conv: Tensor  # (taps, C), the slot's ring
    state: Tensor  # (Hv, Dv, Dk)
    first: int


class Arithmetic:
    """float64: exact, or with every result that a kernel may round moved at random by up to `unit` of itself."""

    def __init__(self, unit: float = 0.0) -> None:
        self.unit = unit
        self._random = torch.Generator().manual_seed(0)

    def round(self, x: Tensor) -> Tensor:
        """x, as a kernel may store it."""
        if not self.unit:
            return x
        noise = torch.rand(
            x.shape, generator=self._random
        )  # of either sign, and not small: few throws are to say enough
        return x * (1 + self.unit * (noise + (noise >= 0.5) - 1).double())

    def product(self, x: Tensor, w: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x @ w.T + bias + residual: (M, K) and (N, K) to (M, N). A kernel may round w, too."""
        y = self.round(x @ w.mT)
        if self.unit:
            # As if each number of w had been moved by `round`, at the cost of one more product.
            spread = _SPREAD * self.unit * (x.square() @ w.square().mT).sqrt()
            y = y + spread * torch.randn(y.shape, generator=self._random)
        y = y if bias is None else self.round(y + bias)
        return y if residual is None else self.round(y + residual)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        return self.round(self.round(F.silu(gate)) * up)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) * weight over the last axis."""
        return self.round(self.round(x / (x.square().mean(-1, keepdim=True) + eps).sqrt()) * weight)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor, traditional: bool) -> Tensor:
        """x (N, H, D) with pairs of its first features turned by the angles of cos and sin (N, 1, dims / 2)."""
        dims = 2 * cos.shape[-1]
        a, b = (x[..., 0:dims:2], x[..., 1:dims:2]) if traditional else x[..., :dims].chunk(2, -1)
        turned = (a * cos - b * sin, a * sin + b * cos)
        joined = torch.stack(turned, -1).flatten(-2) if traditional else torch.cat(turned, -1)
        return torch.cat((self.round(joined), x[..., dims:]), -1)

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None, gate: Tensor | None
    ) -> Tensor:
        """Causal attention of the last rows: q (N, Hq, D), keys and values (T, Hkv, D), N of whose T rows are q's."""
        rows, heads, context = q.shape[0], q.shape[1], keys.shape[0]
        keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
        scores = torch.einsum("nhd,thd->hnt", self.round(q * scale), keys)
        positions = torch.arange(context - rows, context)[:, None]
        hidden = torch.arange(context) > positions
        if window is not None:
            hidden |= torch.arange(context) <= positions - window
        weights = self.round(scores.masked_fill(hidden, -torch.inf).softmax(-1))
        out = self.round(torch.einsum("hnt,thd->nhd", weights, values))
        return out if gate is None else self.round(out * torch.sigmoid(gate))

    def experts(
        self,
        x: Tensor,
        chosen: Tensor,
        scores: Tensor,
        mlp: Callable[[int], tuple[Tensor, Tensor]],
        shared: tuple[Tensor, Tensor, Tensor] | None,
        residual: Tensor,
    ) -> Tensor:
        """residual + Σ scores * mlp(x), x (n, D), chosen and scores (n, k); shared: its gate and up, its down, logits.

        `mlp` gives the matrices of an expert: gate and up (2 I, D), down (D, I).
        """
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            gate_up, down = mlp(expert)
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            out[rows] += scores[rows, place, None] * self._gated(x[rows], gate_up, down)
        out = self.round(out)
        if shared is not None:
            gate_up, down, logits = shared
            out = self.round(out + torch.sigmoid(logits) * self._gated(x, gate_up, down))
        return self.round(residual + out)

    def _gated(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = self.product(x, gate_up).chunk(2, -1)
        return self.product(self.swiglu(gate, up), down)

    def delta(self, given: DeltaInputs, weights: DeltaWeights) -> tuple[Tensor, Tensor]:
        """Convolution, gated delta rule and gated norm of one sequence: (N, Hv * Dv), and the state after it."""
        k_heads, v_heads, k_dim, v_dim = weights.k_heads, weights.v_heads, weights.k_dim, weights.v_dim
        groups = v_heads // k_heads
        per_head = given.qkvz.unflatten(-1, (k_heads, -1)).split([k_dim, k_dim, groups * v_dim, groups * v_dim], -1)
        z = per_head[3].reshape(-1, v_heads, v_dim)
        b, a = (x.flatten(-2) for x in given.ba.unflatten(-1, (k_heads, -1)).chunk(2, -1))  # (N, Hv) each
        mixed = self._convolved(torch.cat([x.flatten(-2) for x in per_head[:3]], -1), given, numbers(weights.conv))
        q, k, v = mixed.split([k_heads * k_dim, k_heads * k_dim, v_heads * v_dim], -1)
        q, k = (x.unflatten(-1, (k_heads, k_dim)) for x in (q, k))
        q, k = (self.round(x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()) for x in (q, k))
        q, k = (x.repeat_interleave(groups, 1) for x in (q * k_dim**-0.5, k))  # (N, Hv, Dk)
        v = v.unflatten(-1, (v_heads, v_dim))
        gamma = (-numbers(weights.A_log).exp() * F.softplus(a + numbers(weights.dt_bias), threshold=700)).exp()
        y, state = self._rule(q, k, v, gamma, torch.sigmoid(b), given.state)
        y = self.round(self.norm(y, numbers(weights.norm), weights.eps) * F.silu(z))
        return y.flatten(-2), state

    def _convolved(self, x: Tensor, given: DeltaInputs, taps: Tensor) -> Tensor:
        """silu of the causal convolution of x (N, C); the ring has the input of position p at p % taps."""
        count = len(taps)
        before = [
            given.conv[p % count] if p >= 0 else torch.zeros_like(x[0])
            for p in range(given.first - count + 1, given.first)
        ]
        padded = torch.cat([torch.stack(before), x]) if before else x
        total = sum(taps[i] * padded[i : i + len(x)] for i in range(count))
        assert isinstance(total, Tensor)
        return self.round(F.silu(total))

    def _rule(
        self, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """S = gamma S; S += beta (v - S k) kᵀ; y = S q, step by step: (N, Hv, Dv)."""
        outputs, met = [], self.round(state)
        for t in range(len(q)):
            state = state * gamma[t, :, None, None]
            seen = torch.einsum("hvk,hk->hv", met * gamma[t, :, None, None], k[t])
            change = self.round(beta[t, :, None] * (v[t] - seen))
            state = state + change[..., None] * k[t, :, None, :]
            met = self.round(state)
            outputs.append(torch.einsum("hvk,hk->hv", met, q[t]))
        return self.round(torch.stack(outputs)), state


def distribution(scores: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities (V,) with which tokens of these scores are drawn: filters first, then the temperature."""
    order = scores.argsort(descending=True)
    logs = scores[order].log_softmax(0)
    kept = torch.ones_like(logs, dtype=torch.bool)
    if 0 < params.top_p < 1:
        kept &= logs.exp().cumsum(0) - logs.exp() < params.top_p
    if params.min_p:
        kept &= logs.exp() >= params.min_p * logs[0].exp()
    if params.top_k:
        kept &= torch.arange(len(logs)) < params.top_k
    drawn = (logs.masked_fill(~kept, -torch.inf) / params.temperature).softmax(0)
    return torch.empty_like(drawn).index_copy_(0, order, drawn)
