"""Softmax and the gated activation of the feed-forward blocks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.ops._common import check_devices, kernels_take, normalize_axis, widen

# Larger float32 temporaries than this cost the CPU more in fresh pages than the arithmetic does.
_SWIGLU_BLOCK = 1 << 17


def softmax(a: Tensor, axis: int | Sequence[int] | None = None, *, precise: bool = False) -> Tensor:
    """exp(a) / sum(exp(a)) over one axis, over several together, or over all of `a` (None).

    Sums are float32 whatever `precise` says, so it changes nothing; MLX callers pass it. Integers give
    float32. A row of nothing but -inf gives NaN. ValueError for an axis that is absent or named twice, and
    for complex numbers.
    """
    if a.is_complex():
        raise ValueError(f"softmax: a must be real, got {a.dtype}")
    if isinstance(axis, int):
        axis = (axis,)
    axes = range(a.ndim) if axis is None else [normalize_axis("softmax", i, a.ndim) for i in axis]
    if len(set(axes)) != len(axes):
        raise ValueError(f"softmax: axis names a dimension twice: {tuple(axes)}")
    dtype = a.dtype if a.is_floating_point() else torch.float32
    wide = torch.promote_types(dtype, torch.float32)
    if len(axes) == 1 and axes[0] == a.ndim - 1 and kernels_take(a):
        from gfxlm.kernels.basic import activation

        return activation.softmax(a, dtype)
    if len(axes) == 1:
        return torch.softmax(a, axes[0], dtype=wide).to(dtype)
    last = tuple(range(a.ndim - len(axes), a.ndim))
    moved = a.movedim(tuple(axes), last)
    rows = moved.unsqueeze(-1) if not axes else moved.flatten(a.ndim - len(axes))
    return torch.softmax(rows, -1, dtype=wide).to(dtype).reshape(moved.shape).movedim(last, tuple(axes))


def swiglu(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x (Shazeer, 2020), computed in float32 and rounded once.

    gate and x have one shape; the result has the type that they promote to. ValueError if the shapes differ
    or the types are not floating.
    """
    if gate.shape != x.shape:
        raise ValueError(f"swiglu: gate and x must have one shape, got {tuple(gate.shape)} and {tuple(x.shape)}")
    dtype = torch.promote_types(gate.dtype, x.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"swiglu: gate and x must be floating, got {gate.dtype} and {x.dtype}")
    check_devices("swiglu", gate=gate, x=x)
    if gate.ndim > 0 and kernels_take(gate, x):
        from gfxlm.kernels.basic import activation

        return activation.swiglu(gate, x, dtype)
    if gate.device.type != "cpu" or gate.numel() <= _SWIGLU_BLOCK:
        return (F.silu(widen(gate)) * x).to(dtype)
    shape, width = gate.shape, gate.shape[-1]
    gate, x = gate.reshape(-1, width), x.reshape(-1, width)
    rows = max(1, _SWIGLU_BLOCK // width)
    out = torch.empty(gate.shape, dtype=dtype)
    for y, g, value in zip(*(torch.split(t, rows) for t in (out, gate, x)), strict=True):
        y.copy_(F.silu(widen(g)) * value)
    return out.view(shape)
