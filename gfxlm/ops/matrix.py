"""What operations ask of a weight that knows its own layout, and products with one that is not quantised."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.ops._common import kernels_take

_HALVES = (torch.bfloat16, torch.float16)


class Matrix(Protocol):
    """A matrix (N, K) that can be multiplied with."""

    def matmul(self, x: Tensor) -> Tensor:
        """`x @ w.T`: (..., K) to (..., N)."""


class MatrixStack(Protocol):
    """One matrix for each expert."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, N, K)."""

    def matrix(self, index: int) -> Matrix:
        """The matrix of that number, without a copy."""


def dense_matmul(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w.T` for an unquantised w (N, K): (..., K) to (..., N). On a GPU, by the library that is known to be right.

    ValueError where x has other columns than w.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x: last dimension {x.shape[-1]} does not match w {tuple(w.shape)}")
    if x.numel() == 0 or not kernels_take(x, w):
        return _padded_linear(x, w) if x.device.type == "cpu" and x.dtype in _HALVES else F.linear(x, w)
    from gfxlm.kernels.linear.dense import product

    return product(x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[0])


def _padded_linear(x: Tensor, w: Tensor) -> Tensor:
    """`F.linear` of few different numbers of rows: oneDNN keeps half a megabyte for each, and never gives it back."""
    rows = x.shape[:-1].numel()
    step = 1 if rows <= 8 else 8 if rows <= 64 else 64
    flat = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, -rows % step))
    return F.linear(flat, w)[:rows].view(*x.shape[:-1], w.shape[0])
