"""The public operations on a GPU give what they give on the CPU, for all the arguments they take."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm import ops
from gfxlm.ops.delta_mixer import DeltaWeights
from tests.kernels.delta.oracle import DEVICE, Mixer

MODULES = ("gfxlm.ops.delta", "gfxlm.ops.convolution", "gfxlm.ops.delta_mixer")


def on_both(monkeypatch: pytest.MonkeyPatch, run: Any, *args: Tensor) -> tuple[Any, Any]:
    """The result of the CPU's code, and of the kernels: on a GPU, or interpreted."""
    expected = run(*(t.clone() for t in args))
    for module in MODULES:
        monkeypatch.setattr(f"{module}.on_gpu", lambda x: True)
    return expected, run(*(t.clone().to(DEVICE) for t in args))


def assert_near(ours: Tensor, expected: Tensor, bound: float) -> None:
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    error = (ours.cpu().double() - expected.double()).square().mean().sqrt()
    assert error <= bound * expected.double().square().mean().sqrt()


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 9, 67]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mixer(monkeypatch: pytest.MonkeyPatch, lengths: list[int], dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        lengths = [min(length, 12) for length in lengths]
    m = Mixer(1, 2, 16, 16, dtype=dtype)
    positions, slots = ops.ragged([2, 0, 3], lengths, [0, 5, 1])
    qkvz, ba = (t.cpu() for t in m.projections(sum(lengths)))
    ring, state = (t.cpu() for t in m.caches(4))

    def run(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkvz, ba, conv, A_log, dt_bias, norm, positions, index, ring, state = args
        weights = DeltaWeights(conv, A_log, dt_bias, norm, m.eps, m.k_heads)
        y = ops.gated_delta_mixer(qkvz, ba, weights, positions, ops.Slots(index, slots.spans), ring, state)
        return y, ring, state

    inputs = (qkvz, ba, m.conv, m.A_log, m.dt_bias, m.norm, positions, slots.index, ring, state)
    expected, ours = on_both(monkeypatch, run, *inputs)
    bound = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    assert_near(ours[0], expected[0], bound)
    assert_near(ours[2], expected[2], bound)
    for slot, end in ((2, lengths[0]), (0, 5 + lengths[1]), (3, 1 + lengths[2])):
        for position in range(max(0, end - 3), end):
            assert torch.equal(ours[1][slot, position % 4].cpu(), expected[1][slot, position % 4])
    assert torch.equal(ours[1][1].cpu(), ring[1])


def test_rows_of_padding_touch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    m = Mixer(1, 1, 16, 16)
    qkvz, ba = (t.cpu() for t in m.projections(3))
    ring, state = (t.cpu() for t in m.caches(2))
    positions, index = torch.tensor([3, 0, 0]), torch.tensor([1, -1, -1])
    spans = ops.ragged([1], [1], [3])[1].spans

    def run(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkvz, ba, conv, A_log, dt_bias, norm, positions, index, ring, state = args
        weights = DeltaWeights(conv, A_log, dt_bias, norm, m.eps, m.k_heads)
        y = ops.gated_delta_mixer(qkvz, ba, weights, positions, ops.Slots(index, spans), ring, state)
        return y, ring, state

    inputs = (qkvz, ba, m.conv, m.A_log, m.dt_bias, m.norm, positions, index, ring, state)
    for y, new_ring, new_state in on_both(monkeypatch, run, *inputs):
        assert (y[1:] == 0).all()
        assert (y[0] != 0).any()
        assert torch.equal(new_ring[0].cpu(), ring[0])
        assert torch.equal(new_state[0].cpu(), state[0])


def rule_inputs(length: int, dtype: torch.dtype, per_feature: bool = False) -> list[Tensor]:
    q, k = (F.normalize(torch.randn(2, length, 1, 16), dim=-1).to(dtype) for _ in range(2))
    gamma = torch.rand(2, length, 2, 16) if per_feature else torch.rand(2, length, 2)
    return [q / 4, k, torch.randn(2, length, 2, 8).to(dtype), gamma, torch.rand(2, length, 2), torch.randn(2, 2, 8, 16)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("length", "dtype", "per_feature"),
    [(1, torch.bfloat16, False), (70, torch.bfloat16, False), (5, torch.bfloat16, True), (6, torch.float32, False)],
)
def test_rule(
    monkeypatch: pytest.MonkeyPatch, length: int, dtype: torch.dtype, per_feature: bool, masked: bool
) -> None:
    x = rule_inputs(length, dtype, per_feature)
    mask = (torch.rand(2, length) > 0.3).to(DEVICE) if masked else None

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gated_delta_update(*args, mask=None if mask is None else mask.to(args[0].device))

    expected, ours = on_both(monkeypatch, run, *x)
    # Both sides round in fp32, in an order of their own; of a type with fewer bits they may round to neighbours.
    neighbours = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for mine, other in zip(ours, expected, strict=True):
        assert_near(mine, other, 1e-6 + (neighbours if length > 1 else neighbours / 2))


def test_rule_without_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, ours = on_both(monkeypatch, ops.gated_delta_update, *rule_inputs(3, torch.bfloat16)[:5])
    for mine, other in zip(ours, expected, strict=True):
        assert_near(mine, other, 2**-7)


def test_mixed_types(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rule_inputs(3, torch.float32)
    x[2], x[5] = x[2].half(), x[5].bfloat16()
    expected, ours = on_both(monkeypatch, ops.gated_delta_update, *x)
    for mine, other in zip(ours, expected, strict=True):
        assert_near(mine, other, 1e-6)


def test_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, state = (torch.randn(s) for s in ((2, 6, 9), (9, 4), (9,), (2, 3, 9)))
    expected, ours = on_both(monkeypatch, lambda *t: ops.causal_conv1d(*t, activation="silu"), x, weight, bias, state)
    for mine, other in zip(ours, expected, strict=True):
        assert_near(mine, other, 1e-6)


def test_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [t[:, :0] if t.ndim > 2 and t.shape[1] == 1 else t for t in rule_inputs(1, torch.float32)]
    expected, ours = on_both(monkeypatch, ops.gated_delta_update, *x)
    assert all(torch.equal(mine.cpu(), other) for mine, other in zip(ours, expected, strict=True))
