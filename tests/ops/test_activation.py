import mlx.core as mx
import pytest
import torch

from gfxlm import ops
from tests.mlx_bridge import to_mlx, to_torch

HALF_TYPES = [torch.float16, torch.bfloat16]
AXES = [None, 0, 1, 2, -1, (0, 1), [1, 2], (0, 2), (2, 0, 1), (), (-1,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
@pytest.mark.parametrize("axis", AXES)
def test_softmax_is_mlx(dtype: torch.dtype, axis: object) -> None:
    a = (3 * torch.randn(4, 3, 5)).to(dtype)
    out = ops.softmax(a, axis)
    # MLX rounds integers to 0 and 1 unless the axis is the last one, where it gives float32: float32 is meant.
    expected = to_torch(mx.softmax(to_mlx(a.float()), axis))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("axis", [-1, 0, (0, 1)])
def test_softmax_of_half_types_is_rounded_once(dtype: torch.dtype, precise: bool, axis: object) -> None:
    a = (10 * torch.randn(64, 1024)).to(dtype)
    wide = a.double().exp()
    expected = (wide / wide.sum(axis, keepdim=True)).to(dtype)
    assert (ops.softmax(a, axis, precise=precise) == expected).float().mean() > 0.999


def test_softmax_of_infinities() -> None:
    a = torch.tensor([[-torch.inf, -torch.inf], [0, -torch.inf], [torch.inf, 0], [torch.nan, 0]])
    for x in (a, a.bfloat16()):
        expected = to_torch(mx.softmax(to_mlx(x), axis=-1))
        assert torch.equal(ops.softmax(x, -1).isnan(), expected.isnan())
        assert ops.softmax(x, -1)[1].tolist() == [1, 0]
        assert ops.softmax(a, (0, 1)).isnan().all()


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((2, 0), 1), ((0, 3, 4), (1, 2)), ((), None)])
def test_softmax_of_little(shape: tuple[int, ...], axis: object) -> None:
    out = ops.softmax(torch.zeros(shape), axis)
    assert torch.equal(out, torch.ones(shape))


def test_softmax_of_a_transposed_tensor() -> None:
    a = torch.randn(8, 6, 4)
    assert torch.equal(ops.softmax(a, -1).transpose(0, 1), ops.softmax(a.transpose(0, 1), -1))
    torch.testing.assert_close(ops.softmax(a, -1).mT, ops.softmax(a.mT, -2))


@pytest.mark.parametrize("axis", [3, -4, (0, 3)])
def test_softmax_wrong_axis(axis: object) -> None:
    for error in (ValueError, IndexError):  # MLX raises IndexError; both are promised
        with pytest.raises(error, match="softmax: axis"):
            ops.softmax(torch.zeros(2, 3, 4), axis)


def test_softmax_other_errors() -> None:
    with pytest.raises(ValueError, match="twice"):
        ops.softmax(torch.zeros(2, 2), (0, -2))
    with pytest.raises(ValueError, match="0 dimensions"):
        ops.softmax(torch.tensor(1.0), -1)


@pytest.mark.parametrize("rows", [1, 3, 700])  # 700 × 512 is worked off in blocks
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_swiglu_is_rounded_once(rows: int, dtype: torch.dtype) -> None:
    gate, x = (4 * torch.randn(rows, 1024)).to(dtype).chunk(2, -1)  # strided halves of one product
    wide = gate.double()
    expected = wide / (1 + (-wide).exp()) * x.double()
    out = ops.swiglu(gate, x)
    assert out.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-7)
    else:
        assert (out == expected.to(dtype)).float().mean() > 0.999  # two roundings leave about nine in ten


def test_swiglu_keeps_shape_in_blocks() -> None:
    gate, x = torch.randn(2, 3, 100, 700), torch.randn(2, 3, 100, 700)
    torch.testing.assert_close(ops.swiglu(gate, x), torch.nn.functional.silu(gate) * x)
    flat = torch.randn(1 << 18)
    torch.testing.assert_close(ops.swiglu(flat, flat), torch.nn.functional.silu(flat) * flat)


def test_swiglu_errors() -> None:
    with pytest.raises(ValueError, match="one shape"):
        ops.swiglu(torch.ones(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match="floating"):
        ops.swiglu(torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
