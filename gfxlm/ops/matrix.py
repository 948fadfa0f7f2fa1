"""What operations ask of a weight that knows its own layout."""

from typing import Protocol

from torch import Tensor


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
