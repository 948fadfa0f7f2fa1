"""Writing a window: every type and reduction against NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gfxlm.kernels.basic.slice_update import fits, slice_update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
REDUCE = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


def values(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, shape).astype(bool))
    if not dtype.is_floating_point:
        return torch.from_numpy(rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)).view(dtype)[..., 0]
    special = rng.choice([np.nan, np.inf, -np.inf, -0.0, 0.0], shape)
    return torch.from_numpy(np.where(rng.random(shape) < 0.3, special, 30 * rng.normal(size=shape))).to(dtype)


def as_numpy(x: Tensor) -> np.ndarray:
    return x.float().numpy() if x.dtype in FLOATS else x.numpy()


@pytest.mark.parametrize("reduce", [None, *REDUCE])
@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS])
def test_is_numpy(dtype: torch.dtype, reduce: str | None) -> None:
    a, update = values(dtype, (9, 5, 8), 1), values(dtype, (4, 3, 5), 2).transpose(0, 1)
    expected = as_numpy(a).copy()
    old, new = as_numpy(a[2:5, 1:5, 3:8]), as_numpy(update)
    with np.errstate(all="ignore"):
        result = new if reduce is None else REDUCE[reduce](old, new)
    if dtype in FLOATS:
        result = torch.from_numpy(result).to(dtype).float().numpy()
    expected[2:5, 1:5, 3:8] = result
    out = a.to(DEVICE)
    slice_update(out[2:5, 1:5, 3:8], update.to(DEVICE), reduce)
    np.testing.assert_array_equal(as_numpy(out.cpu()), expected)


def test_starts_on_the_device_are_clamped() -> None:
    update = torch.arange(12.0).view(2, 3, 2) + 1
    for starts, place in (((1, 2), (1, 2)), ((-9, 50), (0, 4)), ((7, 0), (3, 0))):
        out = torch.zeros(5, 7, 2, device=DEVICE)
        given = torch.tensor(starts, device=DEVICE)
        slice_update(out[:2, :3], update.to(DEVICE), None, given, (3, 4), out.stride()[:2])
        expected = torch.zeros(5, 7, 2)
        expected[place[0] : place[0] + 2, place[1] : place[1] + 3] = update
        assert torch.equal(out.cpu(), expected)


def test_large_windows_and_expanded_updates() -> None:
    out = torch.zeros(3, 70, 50, device=DEVICE)
    slice_update(out[:, 5:65], torch.arange(50.0, device=DEVICE).expand(3, 60, 50), "sum")
    assert torch.equal(out[:, 5:65].cpu(), torch.arange(50.0).expand(3, 60, 50))
    assert out[:, :5].abs().sum() == 0
    slice_update(out[:, :0], torch.zeros(3, 0, 50, device=DEVICE), None)


def test_what_does_not_fit() -> None:
    x = torch.zeros(4, 4, 4, 4, 4)
    assert fits(x, x, 4)
    assert not fits(x, x, 5)
    assert not fits(x[::2, :3, :3, :3, :3], x[::2, :3, :3, :3, :3], 1)
    assert fits(x[:1, :1, :3, :3, :3], x[:1, :1, :3, :3, :3], 1)
