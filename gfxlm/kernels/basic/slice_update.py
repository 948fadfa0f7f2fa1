"""Writing a window of a tensor in place, with or without what it held before."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.launch import launch
from gfxlm.kernels.sizes import cdiv
from gfxlm.kernels.tuning import config

MAX_DIMS = 4  # of the window, once neighbours that step on as one are merged
MAX_STARTS = 4


@triton.jit
def _start(p_starts, number: tl.constexpr, n_starts: tl.constexpr, limit, step):
    """Elements from the beginning of an axis to its start, clamped so that the window fits."""
    start = tl.zeros([], tl.int64)
    if number < n_starts:
        start += tl.load(p_starts + number)
    return tl.minimum(tl.maximum(start, 0), limit) * step


@triton.jit
def _combined(old, new, reduce: tl.constexpr):
    """In fp32 for half types; NaN wins max and min; integers wrap around."""
    half: tl.constexpr = old.dtype == tl.bfloat16 or old.dtype == tl.float16
    a = old.to(tl.float32) if half else old
    b = new.to(tl.float32) if half else new
    if reduce == "sum":
        out = a + b
    elif reduce == "prod":
        out = a * b
    elif reduce == "max":
        out = tl.where((a > b) | (a != a), a, b)
    else:
        out = tl.where((a < b) | (a != a), a, b)
    return out.to(old.dtype)


@triton.jit(do_not_specialize=["size", "limit_0", "limit_1", "limit_2", "limit_3"])
def slice_update_kernel(
    p_out,  # where the window begins, but for its starts
    p_update,
    p_starts,  # int64 (n_starts,), or None
    size,  # entries of the window
    size_1,  # the window's shape, the first axis left out
    size_2,
    size_3,
    out_0,  # strides of the window in p_out
    out_1,
    out_2,
    out_3,
    update_0,
    update_1,
    update_2,
    update_3,
    limit_0,  # for each start, its largest and how far apart two neighbours are
    limit_1,
    limit_2,
    limit_3,
    step_0,
    step_1,
    step_2,
    step_3,
    reduce: tl.constexpr,
    n_starts: tl.constexpr,
    early: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK entries of the window."""
    before_the_next(early)
    after_the_last(early)
    o_entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_entry < size
    o_entry = o_entry.to(size.dtype)  # divisions are cheaper in 32 bits, where those are enough
    start = _start(p_starts, 0, n_starts, limit_0, step_0) + _start(p_starts, 1, n_starts, limit_1, step_1)
    start += _start(p_starts, 2, n_starts, limit_2, step_2) + _start(p_starts, 3, n_starts, limit_3, step_3)
    i_3 = (o_entry % size_3).to(tl.int64)
    rest = o_entry // size_3
    i_2 = (rest % size_2).to(tl.int64)
    rest = rest // size_2
    i_1 = (rest % size_1).to(tl.int64)
    i_0 = (rest // size_1).to(tl.int64)
    p_out += start + i_0 * out_0 + i_1 * out_1 + i_2 * out_2 + i_3 * out_3
    p_update += i_0 * update_0 + i_1 * update_1 + i_2 * update_2 + i_3 * update_3
    new = tl.load(p_update, mask=mask)
    if reduce is not None:
        new = _combined(tl.load(p_out, mask=mask), new, reduce)
    tl.store(p_out, new, mask=mask)


def fits(window: Tensor, update: Tensor, n_starts: int) -> bool:
    """Whether `slice_update` can write `update` to the window: both have few dimensions, merged, and starts are few."""
    return n_starts <= MAX_STARTS and len(_merged(window, update)) <= MAX_DIMS


def slice_update(
    window: Tensor,
    update: Tensor,
    reduce: str | None,
    starts: Tensor | None = None,
    limits: tuple[int, ...] = (),
    steps: tuple[int, ...] = (),
) -> None:
    """Write `update` to `window`, of one shape and type and any strides, or what `reduce` makes of old and new.

    `starts`, int64 (n,), move the window: start i, clamped to 0...limits[i], by steps[i] elements each.
    """
    if window.numel() == 0:
        return
    if window.dtype == torch.bool:
        reduce = {"sum": "max", "prod": "min"}.get(reduce or "", reduce)
        window, update = window.view(torch.uint8), update.view(torch.uint8)
    axes = _merged(window, update)
    sizes, out, new = zip(*([(1, 0, 0)] * (MAX_DIMS - len(axes)) + axes), strict=True)
    padding = (0,) * (MAX_STARTS - len(limits))
    tuned = config("slice_update", window.device, size=window.numel())
    launch(
        slice_update_kernel,
        (cdiv(window.numel(), tuned["BLOCK"]),),
        window,
        update,
        starts,
        window.numel(),
        *sizes[1:],
        *out,
        *new,
        *limits,
        *padding,
        *steps,
        *padding,
        options={"num_warps": tuned["num_warps"]},
        reduce=reduce,
        n_starts=len(limits),
        BLOCK=tuned["BLOCK"],
    )


def _merged(window: Tensor, update: Tensor) -> list[tuple[int, int, int]]:
    """(size, stride, stride) of the window and the update, neighbours that step on as one in both merged."""
    axes: list[tuple[int, int, int]] = []
    for size, out, new in zip(window.shape, window.stride(), update.stride(), strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1:] == (size * out, size * new):
            axes[-1] = (axes[-1][0] * size, out, new)
        else:
            axes.append((size, out, new))
    return axes
