"""Sorting and selection for every dtype. NaN sorts last and wins argmax and argmin, as in NumPy."""

import torch
from torch import Tensor

from gfxlm.ops._common import as_signed, kernels_take, normalize_axis, sign_bit


def sort(a: Tensor, axis: int | None = -1) -> Tensor:
    """A sorted copy, ascending and stable, NaN last. axis None sorts the flattened tensor."""
    a, axis = _along("sort", a, axis)
    if a.is_complex():
        return a.gather(axis, _argsort_complex(a, axis))
    return _from_key(torch.sort(_sort_key(a), dim=axis, stable=True).values, a.dtype)


def argsort(a: Tensor, axis: int | None = -1) -> Tensor:
    """The indices that sort `a` as `sort` does, int64. axis None indexes the flattened tensor."""
    a, axis = _along("argsort", a, axis)
    if a.is_complex():
        return _argsort_complex(a, axis)
    return torch.sort(_sort_key(a), dim=axis, stable=True).indices


def argmax(a: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The index of the first largest element along the axis, int64. axis None indexes the flattened tensor.

    ValueError if `a` is empty.
    """
    return _arg_reduce("argmax", a, axis, keepdims)


def argmin(a: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The index of the first smallest element along the axis, int64. axis None indexes the flattened tensor.

    ValueError if `a` is empty.
    """
    return _arg_reduce("argmin", a, axis, keepdims)


def topk(a: Tensor, k: int, axis: int | None = -1) -> Tensor:
    """The k largest values along the axis, in no promised order; NaN is larger than every number.

    axis None selects from the flattened tensor. ValueError unless 0 <= k <= the length of the axis.
    """
    a, axis = _along("topk", a, axis)
    if not 0 <= k <= a.shape[axis]:
        raise ValueError(f"topk: k must be from 0 to {a.shape[axis]} for axis {axis} of {tuple(a.shape)}, got {k}")
    return _from_key(torch.topk(_key(a), k, dim=axis).values, a.dtype)


def _along(op: str, a: Tensor, axis: int | None) -> tuple[Tensor, int]:
    return (a.flatten(), 0) if axis is None else (a, normalize_axis(op, axis, a.ndim))


def _arg_reduce(op: str, a: Tensor, axis: int | None, keepdims: bool) -> Tensor:
    if a.numel() == 0:
        raise ValueError(f"{op}: a must not be empty, got {tuple(a.shape)}")
    line, dim = _along(op, a, axis)
    index = _first_best(op, line, dim)
    if not keepdims:
        return index
    return index.view([1] * a.ndim) if axis is None else index.unsqueeze(dim)


def _first_best(op: str, a: Tensor, dim: int) -> Tensor:
    if a.ndim > 0 and a.shape[dim] < 1 << 31 and kernels_take(a):
        from gfxlm.kernels.basic.select import select

        lines = a.movedim(dim, -1)
        return select(lines.reshape(-1, a.shape[dim]), smallest=op == "argmin").view(lines.shape[:-1])
    # torch.max with a dimension, not torch.argmax: that one is six times slower for half types on the CPU.
    return (torch.max if op == "argmax" else torch.min)(_key(a), dim).indices


def _key(a: Tensor) -> Tensor:
    """`a` as a type that torch can compare, in the same order."""
    if a.is_complex():
        raise ValueError(f"a: complex numbers have no largest, got {a.dtype}")
    if a.dtype == torch.bool:
        return a.view(torch.uint8)
    flip = sign_bit(a.dtype)
    return as_signed(a) ^ flip if flip else a


def _sort_key(a: Tensor) -> Tensor:
    # On a GPU torch sorts by bits: a NaN whose sign is set would come first.
    return a.masked_fill(a.isnan(), torch.nan) if a.is_floating_point() and a.device.type != "cpu" else _key(a)


def _from_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    flip = sign_bit(dtype)
    return (key ^ flip if flip else key).view(dtype)


def _argsort_complex(a: Tensor, axis: int) -> Tensor:
    """By real part, then by imaginary part, NaN last: two stable sorts, the lesser key first."""
    by_imag = torch.sort(a.imag, dim=axis, stable=True).indices
    real = torch.where(a.isnan(), torch.nan, a.real).gather(axis, by_imag)
    return by_imag.gather(axis, torch.sort(real, dim=axis, stable=True).indices)
