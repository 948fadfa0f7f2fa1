import itertools
from typing import Any

import mlx.core as mx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gfxlm import ops
from tests.mlx_bridge import to_mlx, to_torch

WAVES = torch.tensor([1.0, 4.0, 30.0, 200.0])
ARGS: dict[str, Any] = {"traditional": False, "base": 10000.0, "scale": 1.0, "offset": 0}


def through_mlx(x: Tensor, dims: int, **args: Any) -> Tensor:
    given = {name: to_mlx(arg) if isinstance(arg, Tensor) else arg for name, arg in args.items()}
    return to_torch(mx.fast.rope(to_mlx(x), dims, **given))


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"base": 1000000.0},
        {"scale": 2.0},
        {"offset": 3},
        {"offset": -3},
        {"offset": torch.tensor(7)},
        {"offset": torch.tensor([7])},
        {"offset": torch.tensor([7, 2], dtype=torch.int32)},
        {"offset": torch.tensor(7, dtype=torch.uint32)},
        {"base": None, "freqs": WAVES},
        {"base": None, "freqs": WAVES, "scale": 0.25, "offset": 9},
        {"base": None, "freqs": WAVES.bfloat16()},
        {"base": None, "freqs": torch.tensor([1, 2, 3, 4])},
    ],
)
def test_rope_is_mlx(case: dict[str, Any], dtype: torch.dtype, traditional: bool) -> None:
    args = ARGS | {"traditional": traditional} | case
    ulp = torch.finfo(dtype).eps  # MLX rounds the cosines and each product to x's type
    tolerance = {"rtol": ulp, "atol": max(4 * ulp, 2e-6)}
    for shape, dims in itertools.product([(2, 4, 8), (2, 3, 4, 12), (2, 3, 2, 4, 8), (2, 3, 0, 8)], [8]):
        x = torch.randn(shape).to(dtype)
        out = ops.rope(x, dims, **args)
        assert out.dtype == dtype
        assert torch.equal(out[..., dims:], x[..., dims:])
        torch.testing.assert_close(out, through_mlx(x, dims, **args), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("traditional", [False, True])
def test_half_types_are_rounded_once(dtype: torch.dtype, traditional: bool) -> None:
    x = torch.randn(1, 4, 64, 128).to(dtype)
    args = ARGS | {"traditional": traditional, "offset": 4000}
    out = ops.rope(x, 128, **args)
    assert torch.equal(out, ops.rope(x.float(), 128, **args).to(dtype))


@pytest.mark.parametrize("position", [0, 1, 1000, 131071])
def test_angles_are_float32_products(position: int) -> None:
    cos, sin = ops.rope_angles(torch.tensor([[position]]), 96, base=1000000.0, scale=0.5)
    assert cos.shape == sin.shape == (1, 1, 48)
    assert cos.dtype == sin.dtype == torch.float32
    exact = position * 0.5 * 1000000.0 ** (-torch.arange(0, 96, 2, dtype=torch.float64) / 96)
    # The angle is rounded to float32, twice: its error grows with it.
    bound = exact * 2**-23 + 1e-6
    assert ((cos[0, 0] - exact.cos()).abs() <= bound).all()
    assert ((sin[0, 0] - exact.sin()).abs() <= bound).all()


@settings(max_examples=25, deadline=None)
@given(
    dims=st.integers(1, 8).map(lambda n: 2 * n),
    extra=st.integers(0, 3),
    m=st.integers(0, 500),
    n=st.integers(0, 500),
    traditional=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_dot_products_depend_on_distance(dims: int, extra: int, m: int, n: int, traditional: bool, seed: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, dims + extra, dtype=torch.float64)
    shift = 17

    def dot(first: int, second: int) -> Tensor:
        args = ARGS | {"traditional": traditional}
        left, right = (ops.rope(x, dims, **args | {"offset": at}) for x, at in ((q, first), (k, second)))
        torch.testing.assert_close(left.norm(), q.norm(), rtol=1e-6, atol=0)
        return (left * right).sum()

    torch.testing.assert_close(dot(m, n), dot(m + shift, n + shift), rtol=0, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 100), length=st.integers(1, 5), offset=st.integers(0, 1000))
def test_a_slice_of_the_whole_is_the_slice_at_its_offset(start: int, length: int, offset: int) -> None:
    x = torch.randn(1, 2, 110, 16)
    part = slice(start, start + length)
    whole = ops.rope(x, 16, **ARGS | {"offset": offset})
    assert torch.equal(whole[:, :, part], ops.rope(x[:, :, part], 16, **ARGS | {"offset": offset + start}))


def test_rotate_of_a_flattened_batch() -> None:
    x = torch.randn(5, 3, 16)  # (N, H, D)
    positions = torch.tensor([4, 0, 1, 2, 9])
    cos, sin = ops.rope_angles(positions, 8, base=10000.0)
    out = ops.rotate(x, cos[:, None], sin[:, None])
    for row, position in enumerate(positions.tolist()):
        expected = ops.rope(x[None, row, :, None], 8, **ARGS | {"offset": position})
        torch.testing.assert_close(out[row], expected[0, :, 0])


def test_strided_input_and_gradient() -> None:
    x = torch.randn(2, 6, 8, 64).transpose(1, 2)
    assert torch.equal(ops.rope(x, 64, **ARGS), ops.rope(x.contiguous(), 64, **ARGS))
    small = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    for traditional in (False, True):
        assert torch.autograd.gradcheck(lambda t, i=traditional: ops.rope(t, 6, **ARGS | {"traditional": i}), small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 0}, "dims must be positive and even"),
        ({"dims": -2}, "dims must be positive and even"),
        ({"dims": 7}, "dims must be positive and even"),
        ({"dims": 16}, "dims must not exceed"),
        ({"base": None}, "exactly one of base and freqs must be given, got neither"),
        ({"freqs": WAVES}, "exactly one of base and freqs must be given, got both"),
        ({"base": -1.0}, "base must be positive"),
        ({"base": None, "freqs": WAVES[:3]}, "freqs must have shape"),
        ({"base": None, "freqs": WAVES[None]}, "freqs must have shape"),
        ({"offset": torch.tensor([1, 2, 3])}, "offset must be one integer or one per sequence"),
        ({"offset": torch.tensor([[1], [2]])}, "offset must be one integer or one per sequence"),
        ({"offset": torch.tensor(1.0)}, "offset must be an integer"),
        ({"offset": 1.5}, "offset must be an integer"),
        ({"a": torch.zeros(4, 8)}, "at least 3 dimensions"),
        ({"a": torch.zeros(2, 4, 8, dtype=torch.int32)}, "must be floating"),
    ],
)
def test_rope_errors(change: dict[str, Any], message: str) -> None:
    args = {"a": torch.zeros(2, 4, 8), "dims": 8} | ARGS | change
    with pytest.raises(ValueError, match=message):
        ops.rope(args.pop("a"), args.pop("dims"), **args)


def test_rotate_errors() -> None:
    x, cos = torch.zeros(3, 8), torch.zeros(3, 5)
    with pytest.raises(ValueError, match="10 features, x has 8"):
        ops.rotate(x, cos, cos)
    with pytest.raises(ValueError, match="one shape"):
        ops.rotate(x, cos[:, :2], cos[:, :3])
