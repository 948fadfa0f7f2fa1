"""Products with unquantised matrices: by the BLAS library that answers, and by a plain kernel where none does."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.device import gemm
from gfxlm.device.gemm import TRITON
from gfxlm.kernels.launch import launch
from gfxlm.kernels.layout import adjacent
from gfxlm.kernels.sizes import cdiv
from gfxlm.kernels.tuning import config


@triton.jit(do_not_specialize=["M"])
def dense_kernel(
    p_x,  # (M, K), strided rows
    p_w,  # (N, K), strided rows
    p_bias,  # (N,) or None
    p_y,  # (M, N), strided rows
    M,
    N,
    stride_x,
    stride_w,
    stride_y,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N columns of BLOCK_M rows of y. Neighbouring programs share the rows of w."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    first_n = (tl.program_id(0) // m_blocks).to(tl.int64) * BLOCK_N
    first_m = (tl.program_id(0) % m_blocks).to(tl.int64) * BLOCK_M
    # Rows past the end repeat the last one, and are not stored: no mask in the loop where K is a multiple of the tile.
    o_n = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_n).to(tl.int32))
    o_m = tl.minimum(tl.arange(0, BLOCK_M), (M - 1 - first_m).to(tl.int32))
    o_k = tl.arange(0, BLOCK_K)
    p_xs = p_x + first_m * stride_x + (o_m[:, None] * stride_x + o_k[None, :])  # (BLOCK_M, BLOCK_K)
    p_ws = p_w + first_n * stride_w + (o_n[None, :] * stride_w + o_k[:, None])  # (BLOCK_K, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            b_x, b_w = tl.load(p_xs), tl.load(p_ws)
        else:
            b_x = tl.load(p_xs, mask=first_k + o_k[None, :] < K, other=0.0)
            b_w = tl.load(p_ws, mask=first_k + o_k[:, None] < K, other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
        p_xs += BLOCK_K
        p_ws += BLOCK_K
    if p_bias is not None:
        acc += tl.load(p_bias + first_n + o_n).to(tl.float32)[None, :]
    o_n = first_n + tl.arange(0, BLOCK_N)
    o_m = first_m + tl.arange(0, BLOCK_M)
    p_ys = p_y + o_m[:, None] * stride_y + o_n[None, :]
    tl.store(p_ys, acc.to(p_y.dtype.element_ty), mask=(o_m[:, None] < M) & (o_n[None, :] < N))


def dense(x: Tensor, w: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x @ w.T + bias`, summed in fp32 and rounded once: x (M, K), w (N, K), bias (N,) of one type, and so is `out`.

    Rows may lie anywhere, the numbers of one side by side.
    """
    _check(x, w, bias, out)
    rows, n = x.shape[0], w.shape[0]
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device) if out is None else out
    if y.numel() == 0:
        return y
    options = config("dense", x.device, m=rows, itemsize=x.itemsize)
    block_m, block_n, block_k = (options.pop(name) for name in ("block_m", "block_n", "block_k"))
    launch(
        dense_kernel,
        (cdiv(rows, block_m) * cdiv(n, block_n),),
        x,
        w,
        bias,
        y,
        rows,
        n,
        x.stride(0),
        w.stride(0),
        y.stride(0),
        K=x.shape[1],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        options=options,
    )
    return y


def product(x: Tensor, w: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`dense` by whoever is known to do it right on this machine; products of fp32 numbers are never of fewer bits."""
    library = gemm.prefer(x.device, x.dtype, x.shape[0])
    if library == TRITON:
        return dense(adjacent(x), w, bias=bias, out=out)
    if bias is None:
        return torch.mm(x, w.mT, out=out)
    if library == gemm.ROCBLAS:  # torch would hand a bias that is a vector to hipBLASLt all the same
        y = bias.expand(x.shape[0], -1).contiguous() if out is None else out.copy_(bias.expand_as(out))
        return y.addmm_(x, w.mT)
    return torch.addmm(bias, x, w.mT, out=out)


def _check(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor | None) -> None:
    if w.ndim != 2 or (w.numel() and w.stride(1) != 1):
        raise ValueError(f"w: must be (N, K) of adjacent numbers, got {tuple(w.shape)} of strides {w.stride()}")
    n, k = w.shape
    if x.ndim != 2 or x.shape[1] != k or (x.numel() and x.stride(1) != 1):
        raise ValueError(f"x: must be (M, {k}) of adjacent numbers, got {tuple(x.shape)} of strides {x.stride()}")
    if bias is not None and (bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(f"bias: must be ({n},), got {tuple(bias.shape)} of strides {bias.stride()}")
    if out is not None and (out.shape != (x.shape[0], n) or (out.numel() and out.stride(1) != 1)):
        raise ValueError(f"out: must be ({x.shape[0]}, {n}) of adjacent numbers, got {tuple(out.shape)}")
    for name, given in (("w", w), ("bias", bias), ("out", out)):
        if given is not None and given.dtype != x.dtype:
            raise ValueError(f"{name}: must be {x.dtype} as x is, got {given.dtype}")
