import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gfxlm import ops
from gfxlm.ops.indexing import _index_on_device
from tests.mlx_bridge import to_mlx, to_torch

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES = [torch.bool, *INTEGERS, *FLOATS]
REDUCE = {None: None, "sum": "add", "prod": "multiply", "max": "maximum", "min": "minimum"}


def values(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits of an integer type; for floats, numbers of all sizes with NaN and infinities among them."""
    rng = np.random.default_rng(seed)
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, shape).astype(bool))
    if not dtype.is_floating_point:
        return torch.from_numpy(rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)).view(dtype)[..., 0]
    special = rng.choice([np.nan, np.inf, -np.inf, -0.0, 0.0], shape)
    return torch.from_numpy(np.where(rng.random(shape) < 0.3, special, 30 * rng.normal(size=shape))).to(dtype)


def numpy_reduce(old: Tensor, new: Tensor, reduce: str | None) -> np.ndarray:
    """NumPy's own operation on the type; for bfloat16 in float32 and rounded once."""
    if reduce is None:
        return new.float().numpy() if new.dtype in FLOATS else new.numpy()
    a, b = (x.float().numpy() if x.dtype in FLOATS else x.numpy() for x in (old, new))
    with np.errstate(all="ignore"):
        out = getattr(np, REDUCE[reduce] or "")(a, b)
    return torch.from_numpy(out).to(old.dtype).float().numpy() if old.dtype in FLOATS else out


def as_numpy(x: Tensor) -> np.ndarray:
    return x.float().numpy() if x.dtype in FLOATS else x.numpy()


@settings(max_examples=120, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    reduce=st.sampled_from(list(REDUCE)),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_is_numpy(
    dtype: torch.dtype, reduce: str | None, shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    window = tuple(data.draw(st.integers(1, n)) for n in shape)
    starts = [data.draw(st.integers(0, n - m)) for n, m in zip(shape, window, strict=True)]
    axes = data.draw(st.permutations(range(len(shape))))
    a, update = values(dtype, shape, seed), values(dtype, window, seed + 1)
    before = a.clone()
    out = ops.slice_update(a, update, torch.tensor([starts[i] for i in axes]), axes, reduce)
    expected = as_numpy(a).copy()
    place = tuple(slice(s, s + m) for s, m in zip(starts, window, strict=True))
    expected[place] = numpy_reduce(a[place], update, reduce)
    assert out.dtype == dtype
    np.testing.assert_array_equal(as_numpy(out), expected)
    np.testing.assert_array_equal(as_numpy(a), as_numpy(before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", list(REDUCE))
def test_is_mlx(dtype: torch.dtype, reduce: str | None) -> None:
    a, update = values(dtype, (6, 8), 1), values(dtype, (3, 2), 2)
    out = ops.slice_update(a, update, (2, 5), (0, 1), reduce)
    if reduce is None:
        expected = mx.slice_update(to_mlx(a), to_mlx(update), mx.array([2, 5]), (0, 1))
    else:
        expected = getattr(to_mlx(a).at[2:5, 5:7], REDUCE[reduce] or "")(to_mlx(update))
    np.testing.assert_array_equal(as_numpy(out), np.array(expected.astype(mx.float32) if dtype in FLOATS else expected))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_extremes(dtype: torch.dtype) -> None:
    top = torch.iinfo(dtype).max
    a = torch.tensor([top, 1, top // 2 + 1, top], dtype=dtype)
    update = torch.tensor([2, top, 1, top], dtype=dtype)
    expected = {
        "sum": [1, 0, top // 2 + 2, top - 1],
        "prod": [top - 1, top, top // 2 + 1, 1],
        "max": [top, top, top // 2 + 1, top],
        "min": [2, 1, 1, top],
    }
    for reduce, result in expected.items():
        assert ops.slice_update(a, update, 0, 0, reduce).tolist() == result


@pytest.mark.parametrize(
    ("update_shape", "starts", "axes"),
    [
        ((2, 2), [1, 1], (0, 1)),
        ((2, 2), [0, 2], (1, 0)),
        ((2, 2), [1, 1], (-2, -1)),
        ((2, 4), [1], (0,)),
        ((2, 4), 1, [0]),
        ((2, 1), [1], (0,)),  # an axis of one entry is not stretched
        ((2, 3), [1], (0,)),
        ((4,), [1], (0,)),  # a named axis that the update lacks has one entry
        ((2,), [1], (1,)),  # one that is not named is filled
        ((), [1], (0,)),
        ((), [3, 2], (0, 1)),
    ],
)
def test_window_shapes_are_mlx(update_shape: tuple[int, ...], starts: Any, axes: Any) -> None:
    a, update = torch.zeros(4, 4), torch.rand(update_shape) + 1
    out = ops.slice_update(a, update, torch.tensor(starts), axes)
    assert torch.equal(out, to_torch(mx.slice_update(to_mlx(a), to_mlx(update), mx.array(starts), axes)))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint32, torch.int64, list, tuple])
def test_kinds_of_starts(kind: Any) -> None:
    starts = kind((1, 2)) if kind in (list, tuple) else torch.tensor([1, 2], dtype=kind)
    out = ops.slice_update(torch.zeros(3, 3), torch.ones(2, 1), starts, (0, 1))
    assert out.nonzero().tolist() == [[1, 2], [2, 2]]
    assert ops.slice_update(torch.zeros(3), torch.ones(2), 1, 0).tolist() == [0, 1, 1]


def test_update_is_cast() -> None:
    a = torch.zeros(3, dtype=torch.int32)
    assert ops.slice_update(a, torch.tensor([2.7]), 1, 0).tolist() == [0, 2, 0]
    assert ops.slice_update(a.to(torch.uint8), torch.tensor([300]), 1, 0).tolist() == [0, 44, 0]
    assert ops.slice_update(a.float(), torch.tensor([3]), 1, 0, "sum").tolist() == [0, 3, 0]


def test_no_axes_and_strided_inputs() -> None:
    assert ops.slice_update(torch.tensor(1.0), torch.tensor(2.0), [], ()).item() == 2
    shared = torch.arange(3).expand(2, 3)
    assert ops.slice_update(shared, torch.tensor([[9]]), [0, 1], (0, 1)).tolist() == [[0, 9, 2], [0, 1, 2]]
    turned = torch.arange(6, dtype=torch.int32).view(2, 3).T.view(torch.uint32)
    assert ops.slice_update(turned, turned[:1], [2], [0], "max").tolist() == [[0, 3], [1, 4], [2, 5]]


def test_window_on_a_device_is_clamped() -> None:
    a = torch.arange(20).view(4, 5)
    for starts, axes in itertools.product([(-3, 2), (1, 9), (2, 1)], [(0, 1), (1, 0)]):
        index = _index_on_device(a, [2, 3], torch.tensor(starts), list(axes))
        row, column = (min(max(starts[axes.index(i)], 0), limit) for i, limit in ((0, 2), (1, 2)))
        assert torch.equal(a[index], a[row : row + 2, column : column + 3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_starts_on_a_gpu(dtype: torch.dtype) -> None:
    a, update = values(dtype, (6, 8), 1), values(dtype, (3, 2), 2)
    for reduce in REDUCE:
        expected = ops.slice_update(a, update, [3, 6], (0, 1), reduce)
        for starts in (torch.tensor([3, 6]), torch.tensor([3, 6]).cuda(), torch.tensor([4, 9]).cuda()):
            out = ops.slice_update(a.cuda(), update.cuda(), starts, (0, 1), reduce).cpu()
            np.testing.assert_array_equal(as_numpy(out), as_numpy(expected))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 2), [3, 3], (0, 1)), "2 entries from 3 do not fit axis 0"),
        ((torch.ones(2, 2), [0, -1], (0, 1)), "2 entries from -1 do not fit axis 1"),
        ((torch.ones(5, 2), [0, 0], (0, 1)), "larger than x"),
        ((torch.ones(1, 2, 2), [0, 0], (0, 1)), "more dimensions"),
        ((torch.ones(2, 2), [0, 0], (0, 0)), "twice"),
        ((torch.ones(2, 2), [0, 0], (0, 2)), "axis 2 is out of bounds"),
        ((torch.ones(2, 2), [0.0, 0.0], (0, 1)), "must be integers"),
        ((torch.ones(2, 2), torch.tensor([True, False]), (0, 1)), "must be integers"),
        ((torch.ones(2, 2), [0], (0, 1)), "one per axis"),
        ((torch.ones(2, 2), torch.zeros(1, 2, dtype=torch.int64), (0, 1)), "one per axis"),
        ((torch.ones(2, 2), [0, 0], (0, 1), "mean"), "reduce must be None or one of sum, prod, max, min"),
    ],
)
def test_errors(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.slice_update(torch.zeros(4, 4), *args)
