"""What operations ask of a weight that knows its own layout, and products with one that is not quantised."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from gfxlm.ops._common import kernels_take


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
        return F.linear(x, w)
    from gfxlm.kernels.linear.dense import product

    return product(x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[0])
