"""The short causal convolution in front of a linear-attention mixer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.ops._common import check_devices, on_gpu, widen

# From this many steps on, the CPU's convolution is worth its set-up.
_FUSED_STEPS = 16


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over time, y[t] = Σ_j weight[:, j] * x[t - K + 1 + j] + bias, then activation.

    x is (B, T, C), weight (C, K), bias (C,). state, (B, K - 1, C), is what came before x[:, 0], zeros if None.
    Returns y (B, T, C) in x's type, computed in float32 and rounded once, and the new state: the K - 1 inputs that
    came last, old state included. activation is None or "silu". ValueError if a shape, type or activation does not
    fit.
    """
    _check(x, weight, bias, state, activation)
    if on_gpu(x) and x.dtype != torch.float64:
        from gfxlm.kernels.delta.convolution import convolution

        return convolution(x, weight, bias, state, activation == "silu")
    if state is None:
        state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    inputs = torch.cat((state, x), 1)  # (B, K - 1 + T, C)
    convolve = _fused if x.device.type == "cpu" and x.shape[1] >= _FUSED_STEPS else _by_taps
    y = convolve(widen(inputs), widen(weight))
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    # A copy, so that the state does not keep all of the inputs in memory.
    return y.to(x.dtype), inputs[:, x.shape[1] :].clone()


def _by_taps(inputs: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[1]
    length = inputs.shape[1] - taps + 1
    y = inputs[:, :length] * weight[:, 0]
    for j in range(1, taps):
        y = y + inputs[:, j : j + length] * weight[:, j]
    return y


def _fused(inputs: Tensor, weight: Tensor) -> Tensor:
    """As an image one pixel high, channels last, which (B, T, C) is already: the CPU has a kernel for that."""
    image = inputs.transpose(1, 2).unsqueeze(2)  # (B, C, 1, K - 1 + T)
    return F.conv2d(image, weight[:, None, None], groups=weight.shape[0]).squeeze(2).transpose(1, 2)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str | None) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"causal_conv1d: x must be floating (B, T, C), got {x.dtype} {tuple(x.shape)}")
    batch, _, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ValueError(f"causal_conv1d: weight must be ({channels}, K), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"causal_conv1d: bias must be ({channels},), got {tuple(bias.shape)}")
    carried = (batch, weight.shape[1] - 1, channels)
    if state is not None and (state.shape != carried or state.dtype != x.dtype):
        raise ValueError(f"causal_conv1d: state must be {x.dtype} {carried}, got {state.dtype} {tuple(state.shape)}")
    check_devices("causal_conv1d", x=x, weight=weight, bias=bias, state=state)
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
