from typing import Any

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from mlx_lm.models import gated_delta
from torch import Tensor

from gfxlm import ops
from gfxlm.ops.delta import gated_delta_chunked, gated_delta_recurrent
from tests.mlx_bridge import to_mlx, to_torch

DECAYS = {
    "mild": lambda shape: torch.rand(shape) ** 0.1,
    "any": torch.rand,
    "none": torch.ones,
    "e^-20": lambda shape: torch.full(shape, -20.0).exp(),
    "zero": torch.zeros,
    "now and then zero": lambda shape: (torch.rand(shape) > 0.2).float(),
    "now and then e^-20": lambda shape: torch.where(torch.rand(shape) > 0.2, 0.999, 2e-9),
}


def inputs(
    batch: int = 2,
    length: int = 5,
    k_heads: int = 2,
    v_heads: int = 4,
    k_dim: int = 16,
    v_dim: int = 12,
    decay: str = "mild",
) -> dict[str, Tensor]:
    """What a layer feeds in: unit keys, queries scaled by Dk^-1/2, beta in (0, 1), and a state that is not small."""
    rows = (batch, length)
    return {
        "q": F.normalize(torch.randn(*rows, k_heads, k_dim), dim=-1) * k_dim**-0.5,
        "k": F.normalize(torch.randn(*rows, k_heads, k_dim), dim=-1),
        "v": torch.randn(*rows, v_heads, v_dim),
        "gamma": DECAYS[decay]((*rows, v_heads)),
        "beta": torch.rand(*rows, v_heads),
        "state": torch.randn(batch, v_heads, v_dim, k_dim),
    }  # fmt: skip


def float64(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The formula, one head and one step at a time."""
    q, k, v, gamma, beta, state = (x[name].double() for name in ("q", "k", "v", "gamma", "beta", "state"))
    state, y = state.clone(), torch.zeros_like(v)
    group = v.shape[2] // k.shape[2]
    for b in range(v.shape[0]):
        for h in range(v.shape[2]):
            for t in range(v.shape[1]):
                query, key = q[b, t, h // group], k[b, t, h // group]
                state[b, h] *= gamma[b, t, h]
                delta = beta[b, t, h] * (v[b, t, h] - state[b, h] @ key)
                state[b, h] += torch.outer(delta, key)
                y[b, t, h] = state[b, h] @ query
    return y, state


def close(out: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], atol: float) -> None:
    for mine, other in zip(out, expected, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("decay", list(DECAYS))
@pytest.mark.parametrize("run", [gated_delta_recurrent, gated_delta_chunked])
def test_is_exact_for_any_decay(run: Any, decay: str) -> None:
    x = inputs(1, 130, decay=decay)
    close(run(**x), float64(x), 2e-6)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("heads", [(2, 2), (1, 4), (2, 6)])
def test_chunked_is_recurrent(length: int, heads: tuple[int, int]) -> None:
    x = inputs(2, length, *heads)
    close(gated_delta_chunked(**x), gated_delta_recurrent(**x), 2e-6)


def test_chunked_survives_parallel_keys() -> None:
    x = inputs(1, 128, decay="none")
    x["k"][:] = x["k"][:, :1]  # the triangle is full of ones
    x["beta"][:] = 1
    close(gated_delta_chunked(**x), float64(x), 2e-5)


def test_negative_eigenvalues() -> None:
    x = inputs(1, 100)
    x["beta"] = x["beta"] * 2
    close(gated_delta_chunked(**x), float64(x), 1e-5)


@pytest.mark.parametrize("pieces", [[1] * 70, [64, 6], [1, 69], [30, 33, 7], [70]])
def test_pieces_are_the_whole(pieces: list[int]) -> None:
    x = inputs(2, 70, decay="any")
    state, outputs = x.pop("state"), []
    expected = float64(x | {"state": state})
    for piece in zip(*(torch.split(t, pieces, 1) for t in x.values()), strict=True):
        y, state = ops.gated_delta_update(*piece, state)
        outputs.append(y)
    close((torch.cat(outputs, 1), state), expected, 2e-6)


@pytest.mark.parametrize("dims", [(1, 8, 32, 33, 128, 128), (2, 3, 6, 5, 8, 20), (3, 2, 2, 1, 16, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_is_mlx(dims: tuple[int, ...], masked: bool) -> None:
    batch, k_heads, v_heads, length, k_dim, v_dim = dims
    x = inputs(batch, length, k_heads, v_heads, k_dim, v_dim, "any")
    state = x.pop("state")
    mask = torch.rand(batch, length) > 0.4 if masked else None
    out = ops.gated_delta_update(*x.values(), initial_state=state, mask=mask)
    arrays = [to_mlx(t) for t in x.values()]
    given = {"initial_state": to_mlx(state), "mask": None if mask is None else to_mlx(mask)}
    expected = tuple(to_torch(t) for t in mx.fast.gated_delta_update(*arrays, **given))
    close(out, expected, 2e-6)
    without = ops.gated_delta_update(*x.values())
    close(without, tuple(to_torch(t) for t in mx.fast.gated_delta_update(*arrays)), 2e-6)


def test_is_mlx_lm() -> None:
    x = inputs(2, 7)
    expected = gated_delta.gated_delta_ops(*(to_mlx(t) for t in x.values()))
    state = x.pop("state")
    close(ops.gated_delta_update(*x.values(), state), tuple(to_torch(t) for t in expected), 2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_decay_per_key_feature(masked: bool) -> None:
    x = inputs(2, 9)
    state = x.pop("state")
    x["gamma"] = torch.rand(2, 9, 4, 16)
    mask = torch.rand(2, 9) > 0.4 if masked else None
    arrays = [to_mlx(t) for t in (*x.values(), state)]
    expected = mx.fast.gated_delta_update(*arrays, None if mask is None else to_mlx(mask))
    close(ops.gated_delta_update(*x.values(), state, mask), tuple(to_torch(t) for t in expected), 2e-6)


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int32])
def test_masked_steps_are_not_read(length: int, kind: torch.dtype) -> None:
    x = inputs(2, length, decay="any")
    state = x.pop("state")
    mask = torch.full((2, length), 0.5 if kind == torch.float32 else 1).to(kind)
    mask[0, length // 2 :] = 0
    for t in x.values():
        t[0, length // 2 :] = torch.nan
    y, last = ops.gated_delta_update(*x.values(), state, mask)
    assert (y[0, length // 2 :] == 0).all()
    first = [t[:1, : length // 2] for t in x.values()]
    close((y[:1, : length // 2], last[:1]), ops.gated_delta_update(*first, state[:1]), 2e-6)


@pytest.mark.parametrize("types", [["bfloat16"] * 3, ["float16"] * 3, ["float32", "float32", "bfloat16"]])
def test_types_are_mlx(types: list[str]) -> None:
    x = inputs(1, 4)
    state = x.pop("state")
    for name, kind in zip("qkv", types, strict=True):
        x[name] = x[name].to(getattr(torch, kind))
    y, last = ops.gated_delta_update(*x.values(), state)
    theirs = mx.fast.gated_delta_update(*(to_mlx(t) for t in x.values()), to_mlx(state))
    assert (y.dtype, last.dtype) == tuple(to_torch(t).dtype for t in theirs)
    exact, exact_state = float64(x | {"state": state})
    torch.testing.assert_close(last.double(), exact_state, rtol=1e-5, atol=2e-6)
    if y.dtype == torch.float32:
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-6)
    else:  # rounded once, which MLX on the CPU is not
        assert (y == exact.to(y.dtype)).float().mean() > 0.99


def test_inputs_stay_and_half_states_are_widened() -> None:
    x = inputs(1, 3)
    kept = {name: t.clone() for name, t in x.items()}
    state = x.pop("state")
    ops.gated_delta_update(*x.values(), state)
    assert all(torch.equal(t, kept[name]) for name, t in (x | {"state": state}).items())
    out = ops.gated_delta_update(*x.values(), state.bfloat16())
    close(out, ops.gated_delta_update(*x.values(), state.bfloat16().float()), 0)


def test_no_steps() -> None:
    x = inputs(2, 0)
    state = x.pop("state")
    y, last = ops.gated_delta_update(*x.values(), state)
    assert y.shape == (2, 0, 4, 12)
    assert torch.equal(last, state)


@pytest.mark.parametrize("run", [gated_delta_recurrent, gated_delta_chunked])
def test_gradients(run: Any) -> None:
    x = {name: t.double().requires_grad_() for name, t in inputs(1, 3, 1, 2, 4, 3, "any").items()}
    assert torch.autograd.gradcheck(run, tuple(x.values()))


def test_decay_is_mlx_lm() -> None:
    A_log, dt_bias = torch.randn(6), torch.randn(6)
    a = torch.cat((torch.randn(9, 6) * 5, torch.tensor([[-100.0, -30, 0, 30, 80, 300]])))
    out = ops.decay(A_log, a, dt_bias)
    torch.testing.assert_close(
        out, to_torch(gated_delta.compute_g(to_mlx(A_log), to_mlx(a), to_mlx(dt_bias))), rtol=1e-5, atol=1e-30
    )
    step = a.double() + dt_bias.double()
    exact = (-A_log.double().exp() * torch.logaddexp(step, torch.zeros(()).double())).exp()
    torch.testing.assert_close(out.double(), exact, rtol=3e-5, atol=1e-30)


def test_decay_of_half_types_is_float32() -> None:
    A_log, a, dt_bias = (torch.randn(shape).bfloat16() for shape in ((4,), (3, 4), (4,)))
    out = ops.decay(A_log, a, dt_bias)
    assert out.dtype == torch.float32
    assert torch.equal(out, ops.decay(A_log.float(), a.float(), dt_bias.float()))
    with pytest.raises(ValueError, match="one number of heads"):
        ops.decay(A_log, a[:, :3], dt_bias)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 4, 16), "q and k must both be"),
        ("k", (2, 5, 2, 8), "q and k must both be"),
        ("v", (2, 5, 3, 12), "v must be"),
        ("v", (2, 4, 4, 12), "v must be"),
        ("gamma", (2, 5, 2), "gamma must be"),
        ("gamma", (2, 5, 4, 12), "gamma must be"),
        ("beta", (2, 5, 4, 1), "beta must be"),
        ("initial_state", (2, 4, 16, 12), "initial_state must be"),
        ("mask", (2, 6), "mask must be"),
    ],
)
def test_errors(name: str, shape: tuple[int, ...], message: str) -> None:
    x = inputs()
    x["initial_state"] = x.pop("state")
    with pytest.raises(ValueError, match=message):
        ops.gated_delta_update(**x | {name: torch.ones(shape)})


def test_integers_are_refused() -> None:
    x = inputs()
    whole = {name: x[name].int() for name in "qkv"}
    with pytest.raises(ValueError, match="must be floating"):
        ops.gated_delta_update(**whole, gamma=x["gamma"], beta=x["beta"])
