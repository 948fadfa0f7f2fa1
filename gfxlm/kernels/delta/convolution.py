"""The causal depthwise convolution of a batch of equally long sequences."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.delta.formulas import silu
from gfxlm.kernels.delta.tables import tuned
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv


@triton.jit
def convolution_kernel(
    p_x,  # (B, T, C)
    p_weight,  # (C, taps)
    p_bias,  # (C,) or None
    p_state,  # (B, taps - 1, C): what came before, or None: zeros
    p_y,  # (B, T, C)
    p_last,  # (B, taps - 1, C): the inputs that came last
    length,
    channels,
    taps: tl.constexpr,
    activate: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_T steps of BLOCK_C channels of one sequence, or BLOCK_T rows of its new state behind the last step."""
    i_batch = tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    p_x += i_batch * length * channels
    b_y = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for tap in tl.static_range(taps):
        o_from = o_t - (taps - 1 - tap)
        m_x = ((o_from >= 0) & (o_from < length))[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_from[:, None].to(tl.int64) * channels + o_c[None, :], mask=m_x, other=0.0)
        if p_state is not None:
            p_old = p_state + (i_batch * (taps - 1) + o_from[:, None] + taps - 1) * channels + o_c[None, :]
            m_old = (o_from < 0)[:, None] & m_c[None, :]
            b_x = tl.where(m_old, tl.load(p_old, mask=m_old, other=0.0), b_x)
        b_weight = tl.load(p_weight + o_c * taps + tap, mask=m_c, other=0.0).to(tl.float32)
        b_y += b_x.to(tl.float32) * b_weight[None, :]
        if tap == 0:
            # The input taps - 1 steps before step t is row t - T of the new state.
            o_last = (i_batch * (taps - 1) + o_t[:, None] - length) * channels + o_c[None, :]
            m_last = ((o_t >= length) & (o_t < length + taps - 1))[:, None] & m_c[None, :]
            tl.store(p_last + o_last, b_x, mask=m_last)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if activate:
        b_y = silu(b_y)
    o_y = (i_batch * length + o_t[:, None]) * channels + o_c[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=(o_t < length)[:, None] & m_c[None, :])


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activate: bool
) -> tuple[Tensor, Tensor]:
    """y (B, T, C) and the new state (B, taps - 1, C), in x's type. Tensors as `ops.causal_conv1d` describes them."""
    batch, length, channels = x.shape
    taps = weight.shape[1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = torch.empty(batch, taps - 1, channels, dtype=x.dtype, device=x.device)
    if y.numel() + last.numel() == 0:
        return y, last
    constants, options = tuned("conv1d", x.device, channels=channels)
    grid = (
        cdiv(channels, constants["BLOCK_C"]),
        cdiv(length + taps - 1, constants["BLOCK_T"]),
        batch,
    )
    launch(
        convolution_kernel,
        grid,
        x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if state is None else state.contiguous(),
        y,
        last,
        length,
        channels,
        options=options,
        taps=taps,
        activate=activate,
        **constants,
    )
    return y, last
