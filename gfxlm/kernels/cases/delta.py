"""Gated delta nets: Qwen3-Coder-Next's, the built-in model's, and sizes that fit no tile."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.kernels.batch import Span, batch_of
from gfxlm.kernels.case import Call, Case
from gfxlm.kernels.delta.chunks import delta_chunked
from gfxlm.kernels.delta.convolution import convolution
from gfxlm.kernels.delta.prepare import gated_norm, prepare
from gfxlm.kernels.delta.recurrent import delta_recurrent
from gfxlm.kernels.delta.step import delta_step

_HALF = torch.bfloat16


@dataclass(frozen=True, slots=True)
class _Net:
    name: str
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    taps: int = 4

    @property
    def channels(self) -> int:
        return 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim

    @property
    def state_bytes(self) -> int:
        return 4 * self.v_heads * self.v_dim * self.k_dim


_NEXT = _Net("coder-next", 16, 32, 128, 128)
_SMALL = _Net("builtin", 4, 8, 64, 64)
_ODD = _Net("odd", 2, 6, 96, 72, 3)
_TALL = _Net("tall", 2, 2, 128, 256)
_WIDE = _Net("wide", 2, 2, 256, 256)


def cases() -> list[Case]:
    """The mixer's step and its prefill kernel by kernel, the rule step by step, the dense convolution."""
    nets = (_NEXT, _SMALL, _ODD, _TALL, _WIDE)
    return [
        _step(_NEXT, 1, headline=True),
        *(_step(_NEXT, rows) for rows in (8, 64)),
        *(_step(net, 1) for net in nets[1:]),
        _step(_NEXT, 1, torch.float16),
        *(_prepare(net, length) for net in nets for length in (512, 2048) if net is _NEXT or length == 512),
        _rule(_NEXT, 2048, headline=True),
        _rule(_NEXT, 512),
        _rule(_NEXT, 512, torch.float16),
        *(_rule(net, 512) for net in nets[1:] if net is not _WIDE),
        *(_norm(net, 2048) for net in nets),
        *(_recurrent(net, 64, dtype) for net in nets for dtype in (_HALF, torch.float32)),
        _recurrent(_NEXT, 64, torch.float32, per_feature=True),
        *(_convolution(channels, length) for channels in (8192, 200) for length in (1, 512)),
    ]


def _parameters(net: _Net, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    conv = torch.randn(net.taps, net.channels, dtype=dtype, device=device)
    return conv, torch.zeros(net.v_heads, device=device), torch.zeros(net.v_heads, device=device)


def _projections(net: _Net, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    size = net.channels + net.v_heads * net.v_dim
    both = torch.randn(rows, size + 2 * net.v_heads, dtype=dtype, device=device)
    return both[:, :size], both[:, size:]


def _caches(net: _Net, slots: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    ring = torch.zeros(slots, net.taps, net.channels, dtype=dtype, device=device)
    return ring, torch.zeros(slots, net.v_heads, net.v_dim, net.k_dim, device=device)


def _step(net: _Net, rows: int, dtype: torch.dtype = _HALF, *, headline: bool = False) -> Case:
    def make(device: torch.device) -> Call:
        qkvz, ba = _projections(net, rows, dtype, device)
        conv, A_log, dt_bias = _parameters(net, dtype, device)
        norm = torch.ones(net.v_dim, dtype=dtype, device=device)
        positions, slots = torch.full((rows,), 1000, device=device), torch.arange(rows, device=device)
        ring, state = _caches(net, rows, dtype, device)
        return lambda: delta_step(
            qkvz, ba, conv, A_log, dt_bias, norm, 1e-6, net.k_heads, positions, slots, ring, state
        )

    nbytes = rows * (2 * net.state_bytes + dtype.itemsize * net.channels * (net.taps + 1))
    return Case(f"delta_decode/{net.name}/{_named(dtype)}/n{rows}", make, nbytes, headline=headline)


def _prepare(net: _Net, length: int) -> Case:
    def make(device: torch.device) -> Call:
        qkvz, ba = _projections(net, length, _HALF, device)
        conv, A_log, dt_bias = _parameters(net, _HALF, device)
        positions, slots = torch.arange(length, device=device), torch.zeros(length, dtype=torch.int64, device=device)
        ring, _ = _caches(net, 1, _HALF, device)
        batch = batch_of((Span(0, 0, length, length),), device)
        return lambda: prepare(qkvz, ba, conv, A_log, dt_bias, net.k_heads, net.v_dim, positions, slots, ring, batch)

    return Case(f"delta_prepare/{net.name}/t{length}", make, 4 * length * net.channels)


def _inputs(
    net: _Net, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k = (
        torch.nn.functional.normalize(torch.randn(length, net.k_heads, net.k_dim, device=device), dim=-1).to(dtype)
        for _ in range(2)
    )
    v = torch.randn(length, net.v_heads, net.v_dim, device=device).to(dtype)
    gamma, beta = (torch.rand(length, net.v_heads, device=device) for _ in range(2))
    return q, k, v, gamma, beta, torch.zeros(1, net.v_heads, net.v_dim, net.k_dim, device=device)


def _rule(net: _Net, length: int, dtype: torch.dtype = _HALF, *, headline: bool = False) -> Case:
    def make(device: torch.device) -> Call:
        q, k, v, gamma, beta, state = _inputs(net, length, dtype, device)
        return lambda: delta_chunked(q, k, v, gamma, beta, state, batch_of((Span(0, 0, length, length),), device))

    # With chunks of C: K Kᵀ, Q Kᵀ and A T; T V, A T V, T K, A T K; and two products with the state and its update.
    products = 64 * (2 * net.k_dim + 64 + 2 * net.v_dim + 2 * net.k_dim) + 3 * net.k_dim * net.v_dim
    flops = 2 * length * net.v_heads * products
    return Case(f"delta_prefill/{net.name}/{_named(dtype)}/t{length}", make, flops=flops, headline=headline)


def _norm(net: _Net, length: int) -> Case:
    def make(device: torch.device) -> Call:
        y = torch.randn(length, net.v_heads, net.v_dim, dtype=_HALF, device=device)
        qkvz, _ = _projections(net, length, _HALF, device)
        weight = torch.ones(net.v_dim, dtype=_HALF, device=device)
        return lambda: gated_norm(y, qkvz, weight, 1e-6, net.k_heads, net.k_dim)

    return Case(f"delta_norm/{net.name}/t{length}", make, 6 * length * net.v_heads * net.v_dim)


def _recurrent(net: _Net, length: int, dtype: torch.dtype, *, per_feature: bool = False) -> Case:
    def make(device: torch.device) -> Call:
        q, k, v, gamma, beta, state = _inputs(net, length, dtype, device)
        if per_feature:
            gamma = gamma[..., None].repeat(1, 1, net.k_dim)
        batch = batch_of((Span(0, 0, length, length),), device)
        return lambda: delta_recurrent(q, k, v, gamma, beta, state, batch, dtype)

    kind = "feature" if per_feature else "head"
    return Case(f"delta_recurrent/{net.name}/{_named(dtype)}/{kind}", make, 2 * net.state_bytes)


def _convolution(channels: int, length: int) -> Case:
    def make(device: torch.device) -> Call:
        x, state = (torch.randn(2, steps, channels, dtype=_HALF, device=device) for steps in (length, 3))
        weight, bias = torch.randn(channels, 4, device=device), torch.zeros(channels, device=device)
        return lambda: convolution(x, weight, bias, state, True)

    return Case(f"conv1d/{channels}/t{length}", make, 2 * 4 * length * channels)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
