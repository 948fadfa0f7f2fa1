"""Rotary angles of positions."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def angles_kernel(
    p_positions,
    p_freqs,
    p_out,  # fp32 (2, N, half): cosines and sines
    N,
    scale: tl.constexpr,
    magnitude: tl.constexpr,
    half: tl.constexpr,
    early: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_N positions."""
    before_the_next(early)
    after_the_last(early)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = tl.arange(0, BLOCK_H)
    b_position = tl.load(p_positions + o_n, mask=o_n < N, other=0).to(tl.float32) * scale
    b_freq = tl.load(p_freqs + o_h, mask=o_h < half, other=1.0)
    b_angle = b_position[:, None] * tl.div_rn(tl.full(b_freq.shape, 1.0, tl.float32), b_freq)[None, :]
    m = (o_n < N)[:, None] & (o_h < half)[None, :]
    o_out = o_n[:, None] * half + o_h[None, :]
    tl.store(p_out + o_out, magnitude * tl.cos(b_angle), mask=m)
    o_sin = (o_n + N)[:, None] * half + o_h[None, :]
    tl.store(p_out + o_sin, magnitude * tl.sin(b_angle), mask=m)


def angles(positions: Tensor, freqs: Tensor, scale: float, magnitude: float) -> Tensor:
    """`magnitude` times cosine and sine of `positions * scale / freqs`, fp32 (2, N, half), for int64 positions (N,).

    freqs is fp32 (half,); both are contiguous.
    """
    n, half = positions.shape[0], freqs.shape[0]
    out = torch.empty((2, n, half), dtype=torch.float32, device=positions.device)
    if n:
        block = 1 if n < 64 else 8
        launch(
            angles_kernel,
            (cdiv(n, block),),
            positions, freqs, out, n,
            options={"num_warps": 2},
            scale=scale,
            magnitude=magnitude,
            half=half,
            BLOCK_N=block,
            BLOCK_H=next_power_of_2(half),
        )  # fmt: skip
    return out
