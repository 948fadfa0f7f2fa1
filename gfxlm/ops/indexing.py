"""Writing a window of a tensor, MLX's functional way."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gfxlm.ops._common import as_signed, normalize_axis, on_gpu, sign_bit

_REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "prod": torch.mul,
    "max": torch.maximum,
    "min": torch.minimum,
}


def slice_update(
    x: Tensor,
    update: Tensor,
    starts: Tensor | Sequence[int] | int,
    axes: Sequence[int] | int,
    reduce: str | None = None,
) -> Tensor:
    """A copy of `x` with `update` written at `starts` along `axes`; `x` itself is untouched.

    Axes that are not named start at 0. The window has the shape of `update`; leading axes that `update` lacks
    are filled whole, or with one entry if they are named. `update` is cast to x's type. `reduce` is None
    (replace), "sum", "prod", "max" or "min" of old and new: integers wrap around, bool is or/and, NaN wins
    max and min.

    ValueError if an argument does not fit, or a start puts the window outside `x`. Starts in a tensor on an
    accelerator are never read back; the nearest window that fits is written.
    """
    if reduce is not None and reduce not in _REDUCE:
        raise ValueError(f"slice_update: reduce must be None or one of {', '.join(_REDUCE)}, got {reduce!r}")
    named = _axes(axes, x.ndim)
    shape = _window_shape(x, update, named)
    update = update.to(x.device, x.dtype).expand(shape)
    out = x.clone()
    if isinstance(starts, Tensor) and starts.device.type != "cpu":
        _write_at(out, update, _starts(starts, named), named, reduce)
        return out
    window = out
    for axis, start in zip(named, _starts(starts, named).tolist(), strict=True):
        if not 0 <= start <= x.shape[axis] - shape[axis]:
            raise ValueError(
                f"slice_update: {shape[axis]} entries from {start} do not fit axis {axis} of {tuple(x.shape)}"
            )
        window = window.narrow(axis, start, shape[axis])
    window = window[tuple(slice(size) for size in shape)]
    if _by_kernel(window, update, 0):
        from gfxlm.kernels.basic import slice_update as kernel

        kernel.slice_update(window, update, reduce)
    else:
        window = as_signed(window)
        window.copy_(_combine(window, as_signed(update), reduce, sign_bit(x.dtype)))
    return out


def _write_at(out: Tensor, update: Tensor, starts: Tensor, named: list[int], reduce: str | None) -> None:
    """Write to a window whose starts lie on the accelerator: the nearest one that lies in `out`."""
    window = out[tuple(slice(size) for size in update.shape)]
    if _by_kernel(window, update, len(named)):
        from gfxlm.kernels.basic import slice_update as kernel

        limits = tuple(out.shape[axis] - update.shape[axis] for axis in named)
        kernel.slice_update(window, update, reduce, starts, limits, tuple(out.stride(axis) for axis in named))
    else:
        index = _index_on_device(out, list(update.shape), starts, named)
        target = as_signed(out)
        target[index] = _combine(target[index], as_signed(update), reduce, sign_bit(out.dtype))


def _by_kernel(window: Tensor, update: Tensor, n_starts: int) -> bool:
    if not on_gpu(window) or window.dtype.itemsize > 8 or window.is_complex() or window.dtype == torch.float64:
        return False
    from gfxlm.kernels.basic import slice_update as kernel

    return kernel.fits(window, update, n_starts)


def _combine(old: Tensor, new: Tensor, reduce: str | None, flip: int) -> Tensor:
    if reduce is None:
        return new
    if flip and reduce in ("max", "min"):
        return _REDUCE[reduce](old ^ flip, new ^ flip) ^ flip
    return _REDUCE[reduce](old, new)


def _axes(axes: Sequence[int] | int, ndim: int) -> list[int]:
    named = [normalize_axis("slice_update", axis, ndim) for axis in ([axes] if isinstance(axes, int) else axes)]
    if len(set(named)) != len(named):
        raise ValueError(f"slice_update: axes names a dimension twice: {tuple(named)}")
    return named


def _starts(starts: Tensor | Sequence[int] | int, named: list[int]) -> Tensor:
    """The start of every named axis, (len(named),), where starts lives."""
    starts = torch.as_tensor(starts)
    if starts.numel() == 0:
        starts = starts.to(torch.int64)
    if starts.is_floating_point() or starts.is_complex() or starts.dtype == torch.bool:
        raise ValueError(f"slice_update: starts must be integers, got {starts.dtype}")
    if starts.ndim > 1 or starts.numel() != len(named):
        raise ValueError(f"slice_update: starts must be ({len(named)},), one per axis, got {tuple(starts.shape)}")
    return starts.to(torch.int64).reshape(-1)


def _window_shape(x: Tensor, update: Tensor, named: list[int]) -> list[int]:
    """MLX's rule: a missing leading axis is whole unless named; the update's own axes keep their size."""
    missing = x.ndim - update.ndim
    if missing < 0:
        raise ValueError(f"slice_update: update {tuple(update.shape)} has more dimensions than x {tuple(x.shape)}")
    shape = [1 if axis in named else size for axis, size in enumerate(x.shape[:missing])] + list(update.shape)
    if any(size > limit for size, limit in zip(shape, x.shape, strict=True)):
        raise ValueError(f"slice_update: update {tuple(update.shape)} is larger than x {tuple(x.shape)}")
    return shape


def _index_on_device(x: Tensor, shape: list[int], starts: Tensor, named: list[int]) -> tuple[Tensor, ...]:
    """One index tensor per axis that together make the window, its starts clamped so that it lies in `x`."""
    index = []
    for axis, size in enumerate(shape):
        entries = torch.arange(size, device=x.device)
        if axis in named:
            entries = entries + starts[named.index(axis)].clamp(0, x.shape[axis] - size)
        index.append(entries.view([-1 if other == axis else 1 for other in range(x.ndim)]))
    return tuple(index)
