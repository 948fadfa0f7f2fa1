from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gfxlm import ops
from tests.mlx_bridge import to_mlx, to_torch

HALF_TYPES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, torch.float64, *HALF_TYPES]
INTEGERS = [
    getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)
]  # fmt: skip
DTYPES = [torch.bool, *INTEGERS, *FLOATS]


def values(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Few different values, so that there are ties, with the type's extremes and, for floats, NaN and infinities."""
    rng = np.random.default_rng(seed)
    if dtype == torch.bool:
        pool = np.array([False, True])
    elif dtype.is_floating_point:
        pool = np.array([0.0, -0.0, 1.5, -2.0, 0.1, np.inf, -np.inf, np.nan])
    else:
        limits = torch.iinfo(dtype)
        name = str(dtype).removeprefix("torch.")
        pool = np.array([limits.min, limits.max, limits.max // 2 + 1, 0, 1, 3, 3], dtype=name)
    return torch.from_numpy(rng.choice(pool, shape)).to(dtype)


def as_numpy(x: Tensor) -> np.ndarray:
    return x.float().numpy() if x.dtype in HALF_TYPES else x.numpy()


SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES), shape=SHAPES, seed=st.integers(0, 2**31), data=st.data())
def test_sort_and_argsort_are_numpy(dtype: torch.dtype, shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from([None, *range(-len(shape), len(shape))]))
    a = values(dtype, shape, seed)
    out, order = ops.sort(a, axis), ops.argsort(a, axis)
    assert out.dtype == dtype
    np.testing.assert_array_equal(as_numpy(out), np.sort(as_numpy(a), axis=axis, kind="stable"))
    np.testing.assert_array_equal(order.numpy(), np.argsort(as_numpy(a), axis=axis, kind="stable"))
    if dtype.is_floating_point:  # -0.0 and 0.0 are equal and keep their order
        line, dim = (a.flatten(), 0) if axis is None else (a, axis)
        assert torch.equal(out.signbit(), line.signbit().gather(dim, order))


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES), shape=SHAPES, keepdims=st.booleans(), seed=st.integers(0, 2**31), data=st.data())
def test_argmax_and_argmin_are_numpy(
    dtype: torch.dtype, shape: tuple[int, ...], keepdims: bool, seed: int, data: st.DataObject
) -> None:
    axis = data.draw(st.sampled_from([None, *range(-len(shape), len(shape))]))
    a = values(dtype, shape, seed)
    for op in ("argmax", "argmin"):
        out = getattr(ops, op)(a, axis, keepdims)
        np.testing.assert_array_equal(out.numpy(), getattr(np, op)(as_numpy(a), axis=axis, keepdims=keepdims))


@settings(max_examples=40, deadline=None)
@given(dtype=st.sampled_from(DTYPES), shape=SHAPES, seed=st.integers(0, 2**31), data=st.data())
def test_topk_is_the_end_of_the_sorted(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    axis = data.draw(st.sampled_from([None, *range(len(shape))]))
    length = int(np.prod(shape)) if axis is None else shape[axis]
    k = data.draw(st.integers(0, length))
    a = values(dtype, shape, seed)
    out = ops.topk(a, k, axis)
    assert out.dtype == dtype
    ordered = np.sort(as_numpy(a), axis=axis)
    np.testing.assert_array_equal(
        np.sort(as_numpy(out), axis=axis or 0), np.take(ordered, range(length - k, length), axis=axis or 0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES, torch.int32, torch.uint32])
@pytest.mark.parametrize("op", ["sort", "argsort", "argmax", "argmin"])
def test_is_mlx(op: str, dtype: torch.dtype) -> None:
    a = values(dtype, (5, 40), 3)
    for axis in (None, 0, 1):
        out = getattr(ops, op)(a, axis=axis)
        expected = to_torch(getattr(mx, op)(to_mlx(a), axis=axis))
        torch.testing.assert_close(out, expected.to(out.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_wide_rows(dtype: torch.dtype) -> None:
    a = torch.randn(2, 248320).to(dtype)
    a[0, [77777, 248319]] = 100
    a[1, 5] = torch.nan
    assert ops.argmax(a, -1).tolist() == [77777, 5]
    assert ops.argmin(-a, -1).tolist() == [77777, 5]
    ordered = ops.sort(a)
    np.testing.assert_array_equal(as_numpy(ordered), np.sort(as_numpy(a)))
    assert torch.equal(ordered[0, -50:], ops.topk(a[0], 50).sort().values)


@pytest.mark.parametrize("strides", ["transposed", "every other", "expanded", "reversed rows"])
def test_any_strides(strides: str) -> None:
    a = values(torch.float32, (6, 8), 1)
    make: dict[str, Callable[[], Tensor]] = {
        "transposed": lambda: a.T,
        "every other": lambda: a[::2, ::2],
        "expanded": lambda: a[:1].expand(6, 8),
        "reversed rows": lambda: a.flip(0)[1:],
    }
    view = make[strides]()
    for axis in (0, 1):
        np.testing.assert_array_equal(ops.sort(view, axis).numpy(), np.sort(view.numpy(), axis))
        np.testing.assert_array_equal(ops.argmax(view, axis).numpy(), np.argmax(view.numpy(), axis))


def test_complex_sorts_by_real_then_imaginary_part() -> None:
    rng = np.random.default_rng(0)
    a = (rng.integers(0, 4, (6, 20)) + 1j * rng.integers(0, 9, (6, 20))).astype(np.complex64)
    a[0, 3] = complex(np.nan, 2)
    for axis in (None, 0, 1):
        np.testing.assert_array_equal(ops.sort(torch.from_numpy(a), axis).numpy(), np.sort(a, axis))
        order = ops.argsort(torch.from_numpy(a), axis).numpy()
        np.testing.assert_array_equal(order, np.argsort(a, axis, kind="stable"))


def test_scalars_and_empty_tensors() -> None:
    one = torch.tensor(1.0)
    assert ops.sort(one, None).tolist() == [1.0]
    assert ops.argsort(one, None).tolist() == [0]
    assert ops.argmax(one).shape == ops.argmin(one, keepdims=True).shape == ()
    assert ops.sort(torch.zeros(2, 0)).shape == ops.argsort(torch.zeros(2, 0)).shape == (2, 0)
    assert ops.topk(torch.zeros(2, 3), 0).shape == (2, 0)


@pytest.mark.parametrize("op", ["sort", "argsort", "argmax", "argmin"])
@pytest.mark.parametrize("axis", [2, -3])
def test_wrong_axis(op: str, axis: int) -> None:
    for error in (ValueError, IndexError):
        with pytest.raises(error, match=f"{op}: axis {axis}"):
            getattr(ops, op)(torch.zeros(2, 3), axis)


def test_other_errors() -> None:
    for k in (-1, 4):
        with pytest.raises(ValueError, match="topk: k must be from 0 to 3"):
            ops.topk(torch.zeros(2, 3), k)
    with pytest.raises(ValueError, match="topk: axis 2"):
        ops.topk(torch.zeros(2, 3), 1, 2)
    for op in (ops.argmax, ops.argmin):
        with pytest.raises(ValueError, match="must not be empty"):
            op(torch.zeros(2, 0), 0)
