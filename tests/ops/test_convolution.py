import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from torch import Tensor

from gfxlm import ops
from gfxlm.ops.convolution import _by_taps, _fused
from tests.mlx_bridge import to_mlx, to_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(batch: int, length: int, channels: int, taps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((batch, length, channels), (channels, taps), (channels,), (batch, taps - 1, channels))
    return [torch.randn(shape).to(dtype) for shape in shapes]  # x, weight, bias, state


@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (3, 4), (70, 4), (5, 1), (9, 2)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_is_mlx(length: int, taps: int, activation: str | None) -> None:
    x, weight, bias, state = inputs(2, length, 12, taps)
    y, new_state = ops.causal_conv1d(x, weight, bias, state, activation)
    line = mx.concatenate([to_mlx(state), to_mlx(x)], axis=1)
    expected = mx.conv1d(line, to_mlx(weight.unsqueeze(-1)), groups=12) + to_mlx(bias)
    expected = nn.silu(expected) if activation else expected
    torch.testing.assert_close(y, to_torch(expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(new_state, to_torch(line)[:, length:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_once(dtype: torch.dtype) -> None:
    x, weight, bias, state = inputs(1, 200, 64, 4, dtype)
    y, new_state = ops.causal_conv1d(x, weight, bias, state, "silu")
    line = torch.cat((state, x), 1).double()
    exact = (line.unfold(1, 4, 1) * weight.double()).sum(-1) + bias.double()
    exact = exact * exact.sigmoid()
    assert y.dtype == new_state.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    else:
        assert (y == exact.to(dtype)).float().mean() > 0.999


@pytest.mark.parametrize("steps", [[1] * 11, [2, 9], [1, 3, 7], [11]])
def test_pieces_are_the_whole(steps: list[int]) -> None:
    x, weight, bias, _ = inputs(2, sum(steps), 8, 4)
    whole, last = ops.causal_conv1d(x, weight, bias, None, "silu")
    state, pieces = None, []
    for piece in torch.split(x, steps, 1):
        y, state = ops.causal_conv1d(piece, weight, bias, state, "silu")
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, last)


def test_reference_and_fused_agree() -> None:
    x, weight, _, _ = inputs(3, 37, 16, 4)
    torch.testing.assert_close(_by_taps(x, weight), _fused(x, weight), rtol=1e-6, atol=1e-6)


def test_state_is_a_copy_and_inputs_stay() -> None:
    x, weight, _, state = inputs(1, 2, 4, 4)
    kept = x.clone(), state.clone()
    _, new_state = ops.causal_conv1d(x, weight, None, state)
    new_state.zero_()
    assert torch.equal(x, kept[0])
    assert torch.equal(state, kept[1])


def test_no_steps() -> None:
    x, weight, bias, state = inputs(2, 0, 4, 4)
    y, new_state = ops.causal_conv1d(x, weight, bias, state)
    assert y.shape == (2, 0, 4)
    assert torch.equal(new_state, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, "x must be floating"),
        ({"x": torch.zeros(1, 3, 8, dtype=torch.int32)}, "x must be floating"),
        ({"weight": torch.zeros(7, 4)}, "weight must be"),
        ({"weight": torch.zeros(8, 4, 1)}, "weight must be"),
        ({"bias": torch.zeros(7)}, "bias must be"),
        ({"state": torch.zeros(1, 4, 8)}, "state must be"),
        ({"state": torch.zeros(1, 3, 8, dtype=torch.bfloat16)}, "state must be torch.float32"),
        ({"activation": "gelu"}, "activation must be"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    args = {"x": torch.zeros(1, 3, 8), "weight": torch.zeros(8, 4)} | change
    with pytest.raises(ValueError, match=message):
        ops.causal_conv1d(**args)
