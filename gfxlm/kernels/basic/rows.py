"""Where the rows of a tensor of any leading dimensions and strides lie."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """The rows of (..., D), D adjacent: row r at (r // inner) * outer + (r % inner) * step, in elements."""

    tensor: Tensor
    inner: int
    outer: int
    step: int


def rows(x: Tensor) -> Rows:
    """How to find the rows of x (..., D), of a copy where its strides are too many."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        levels = _levels(x)
        if len(levels) <= 2:
            (_, outer), (inner, step) = [*levels, *[(1, 0)] * (2 - len(levels))]
            return Rows(x, inner, outer, step)
    return Rows(x.contiguous(), 1, x.shape[-1], 0)


def _levels(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, neighbours that step on as one merged."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    return levels


@triton.jit
def row_offset(o_row, inner, outer, step):
    """Where row number o_row begins, in elements: int64."""
    return (o_row // inner).to(tl.int64) * outer + (o_row % inner) * step
