"""What a gated delta net is, in float64, one sequence and one step at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Mixer:
    """The sizes and parameters of a mixer, float64 copies of what the kernels are given."""

    k_heads: int
    ratio: int
    k_dim: int
    v_dim: int
    taps: int = 4
    eps: float = 1e-6
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.v_heads = self.k_heads * self.ratio
        self.channels = 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim
        self.conv = (torch.randn(self.taps, self.channels) / self.taps).to(self.dtype)
        self.A_log = torch.rand(self.v_heads) * 2 - 1
        self.dt_bias = torch.randn(self.v_heads)
        self.norm = (1 + 0.1 * torch.randn(self.v_dim)).to(self.dtype)

    def projections(self, rows: int) -> tuple[Tensor, Tensor]:
        """qkvz and ba, as two views of one product."""
        size = self.channels + self.v_heads * self.v_dim
        return torch.randn(rows, size + 2 * self.v_heads).to(self.dtype).to(DEVICE).split([size, 2 * self.v_heads], -1)

    def caches(self, slots: int) -> tuple[Tensor, Tensor]:
        """A ring and a state full of somebody's numbers."""
        ring = torch.randn(slots, self.taps, self.channels).to(self.dtype)
        return ring.to(DEVICE), torch.randn(slots, self.v_heads, self.v_dim, self.k_dim).to(DEVICE)

    def sequence(self, qkvz: Tensor, ba: Tensor, position: int, ring: Tensor, state: Tensor) -> Tensor:
        """y (T, Hv, Dv) of one sequence; its ring and state, float64, are updated in place."""
        ys = []
        for t in range(len(qkvz)):
            groups = qkvz[t].double().cpu().view(self.k_heads, -1)
            values = self.ratio * self.v_dim
            q, k, v, z = groups.split([self.k_dim, self.k_dim, values, values], 1)
            b, a = ba[t].double().cpu().view(self.k_heads, 2, -1).unbind(1)
            ring[(position + t) % self.taps] = torch.cat([x.flatten() for x in (q, k, v)])
            x = torch.zeros(self.channels, dtype=torch.float64)
            for back in range(min(self.taps, position + t + 1)):
                x += ring[(position + t - back) % self.taps] * self.conv[self.taps - 1 - back].double()
            x = x * x.sigmoid()
            q, k, v = x.split([self.k_heads * self.k_dim] * 2 + [self.v_heads * self.v_dim])
            q, k = (
                (u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(self.ratio, 0)
                for u in (q.view(self.k_heads, -1), k.view(self.k_heads, -1))
            )
            q = q * self.k_dim**-0.5
            v, z = v.view(self.v_heads, -1), z.reshape(self.v_heads, -1)
            step = a.flatten() + self.dt_bias.double()
            gamma = (-self.A_log.double().exp() * torch.logaddexp(step, torch.zeros(()).double())).exp()
            if position + t == 0:
                state.zero_()
            state *= gamma[:, None, None]
            delta = b.flatten().sigmoid()[:, None] * (v - (state @ k[..., None])[..., 0])
            state += delta[..., None] * k[:, None]
            y = (state @ q[..., None])[..., 0]
            y = y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.norm.double()
            ys.append(y * z * z.sigmoid())
        return torch.stack(ys)


def rule(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """y (T, Hv, Dv) of one sequence: q, k (T, Hk, Dk), v (T, Hv, Dv), the state, float64, updated in place."""
    q, k, v, gamma, beta = (x.double().cpu() for x in (q, k, v, gamma, beta))
    ratio = v.shape[1] // q.shape[1]
    ys = []
    for t in range(len(q)):
        key, query = k[t].repeat_interleave(ratio, 0), q[t].repeat_interleave(ratio, 0)
        state *= gamma[t][:, None, None] if gamma.ndim == 2 else gamma[t][:, None, :]
        delta = beta[t][:, None] * (v[t] - (state @ key[..., None])[..., 0])
        state += delta[..., None] * key[:, None]
        ys.append((state @ query[..., None])[..., 0])
    return torch.stack(ys)
