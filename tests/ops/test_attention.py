import itertools
from typing import Any

import mlx.core as mx
import pytest
import torch
from torch import Tensor

from gfxlm import ops
from gfxlm.ops import attention
from tests.mlx_bridge import to_mlx, to_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SINKS = [False, True]


def float64(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | str | None = None, sinks: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ) v with every head written out; a row that sees nothing is zero."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = scale * q @ k.mT
    if isinstance(mask, str):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., : k.shape[2]]
    return weights @ v


def qkv(
    batch: int, heads: tuple[int, int], lengths: tuple[int, int], dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((heads[0], lengths[0]), (heads[1], lengths[1]), (heads[1], lengths[1]))
    q, k, v = (torch.randn(batch, *shape, dim).to(dtype) for shape in shapes)
    return q, k, v


def assert_exact(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | str | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Within two roundings to the type: of each weight, before it meets its value, and of the result."""
    expected, spread = (float64(q, k, values, scale, mask, sinks) for values in (v, v.abs()))
    rounding = torch.finfo(out.dtype).eps / 2
    error, bound = (out.double() - expected).abs(), 1.05 * rounding * (spread + expected.abs()) + 3e-6
    assert (error <= bound).all(), f"error {error.max():.2e}, {(error / bound).max():.2f} of the bound"


def masks(batch: int, heads: int, rows: int, keys: int, dtype: torch.dtype) -> dict[str, Tensor | str | None]:
    visible = torch.rand(batch, heads, rows, keys) > 0.3
    visible[..., 0] = True
    return {
        "none": None,
        "causal": "causal",
        "bool": visible,
        "additive": torch.randn(batch, heads, rows, keys).to(dtype),
        "scalar": torch.tensor(True),
        "per key": visible[0, 0, 0],
        "per head": visible[0, :, :1],
        "per batch": torch.randn(batch, 1, 1, keys).to(dtype),
        "log": visible[0, 0].to(dtype).log(),
        "integer": torch.randint(-2, 3, (rows, keys)),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("lengths", [(1, 43), (8, 43), (16, 16), (17, 17), (40, 43), (1, 1)])
@pytest.mark.parametrize("sink", SINKS)
def test_every_mask_is_exact(dtype: torch.dtype, heads: tuple[int, int], lengths: tuple[int, int], sink: bool) -> None:
    q, k, v = qkv(2, heads, lengths, 32, dtype)
    sinks = torch.randn(heads[0]).to(dtype) if sink else None
    for mask in masks(2, heads[0], *lengths, dtype).values():
        out = ops.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask, sinks=sinks)
        assert out.dtype == dtype
        assert_exact(out, q, k, v, 0.2, mask, sinks)


@pytest.mark.parametrize("dim", [20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(dim: int, dtype: torch.dtype) -> None:
    for lengths in ((1, 65), (33, 65)):
        q, k, v = qkv(1, (4, 2), lengths, dim, dtype)
        out = ops.scaled_dot_product_attention(q, k, v, scale=dim**-0.5, mask="causal")
        assert_exact(out, q, k, v, dim**-0.5, "causal")


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive", "per head"])
@pytest.mark.parametrize("sink", SINKS)
def test_is_mlx(mask: str, sink: bool) -> None:
    for heads, lengths in itertools.product([(4, 4), (6, 2)], [(1, 33), (9, 33), (33, 33)]):
        q, k, v = qkv(2, heads, lengths, 64)
        chosen = masks(2, heads[0], *lengths, torch.float32)[mask]
        sinks = torch.randn(heads[0]) if sink else None
        out = ops.scaled_dot_product_attention(q, k, v, scale=0.125, mask=chosen, sinks=sinks)
        given = [to_mlx(t) if isinstance(t, Tensor) else t for t in (chosen, sinks)]
        expected = mx.fast.scaled_dot_product_attention(
            *(to_mlx(t) for t in (q, k, v)), scale=0.125, mask=given[0], sinks=given[1]
        )
        torch.testing.assert_close(out, to_torch(expected), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("lengths", [(1, 24), (8, 24), (24, 24)])
def test_value_size_may_differ(lengths: tuple[int, int]) -> None:
    for dtype in DTYPES:
        q, k, _ = qkv(1, (4, 2), lengths, 48, dtype)
        v = torch.randn(1, 2, lengths[1], 20).to(dtype)
        out = ops.scaled_dot_product_attention(q, k, v, scale=0.1, mask="causal")
        assert_exact(out, q, k, v, 0.1, "causal")


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("sink", SINKS)
def test_a_row_that_sees_nothing_is_zero(rows: int, sink: bool) -> None:
    q, k, v = qkv(1, (4, 2), (rows, 40), 32)
    sinks = torch.zeros(4) if sink else None
    visible = torch.rand(rows, 40) > 0.5
    visible[rows // 2] = False
    for dtype, mask in itertools.product(DTYPES, (visible, visible.float().log())):
        inputs = [t.to(dtype) for t in (q, k, v)]
        narrow = mask if mask.dtype == torch.bool else mask.to(dtype)
        given = None if sinks is None else sinks.to(dtype)
        out = ops.scaled_dot_product_attention(*inputs, scale=1.0, mask=narrow, sinks=given)
        assert (out[:, :, rows // 2] == 0).all()
        assert not out.isnan().any()


@pytest.mark.parametrize("sink", SINKS)
def test_reference_gives_zeros_for_empty_rows(sink: bool) -> None:
    q, k, v = qkv(1, (4, 2), (3, 6), 8)
    visible = torch.tensor([True, False, True]).view(1, 1, 3, 1)
    for mask in (visible, visible.float().log()):
        out = attention.reference(q, k, v, scale=1.0, mask=mask, sinks=torch.zeros(4) if sink else None)
        assert (out[:, :, 1] == 0).all()
        assert_exact(out[:, :, ::2], q[:, :, ::2], k, v, 1.0, sinks=torch.zeros(4) if sink else None)


def test_causal_with_more_queries_than_keys() -> None:
    q, k, v = qkv(1, (2, 1), (30, 10), 16)
    out = ops.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal")
    assert (out[:, :, :20] == 0).all()
    expected = ops.scaled_dot_product_attention(q[:, :, 20:], k, v, scale=0.25, mask="causal")
    torch.testing.assert_close(out[:, :, 20:], expected)


def test_infinite_scores() -> None:
    for dim, rows in itertools.product((4, 128), (1, 8)):
        q, k, v = qkv(1, (4, 4), (rows, 8), dim)
        q, k = torch.ones_like(q), torch.ones_like(k)
        k[..., 0, :] = -torch.inf
        out = ops.scaled_dot_product_attention(q, k, v, scale=1.0)
        torch.testing.assert_close(out, v[:, :, 1:].mean(2, keepdim=True).expand_as(out))


def test_no_rows_and_no_keys() -> None:
    q, k, v = qkv(1, (4, 2), (3, 5), 8)
    assert ops.scaled_dot_product_attention(q[:, :, :0], k, v, scale=1.0).shape == (1, 4, 0, 8)
    empty = ops.scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0], scale=1.0)
    assert torch.equal(empty, torch.zeros_like(q))


@pytest.mark.parametrize("rows", [1, 20])
def test_any_strides(rows: int) -> None:
    q, k, v = qkv(2, (4, 2), (rows, 20), 16)
    layouts = {
        "heads inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "features outside": lambda t: t.mT.contiguous().mT,
        "part of a longer cache": lambda t: torch.cat((t, t), 2)[:, :, : t.shape[2]],
        "part of a wider row": lambda t: torch.cat((t, t), 3)[..., 16:],
    }
    for layout in layouts.values():
        out = ops.scaled_dot_product_attention(*(layout(t) for t in (q, k, v)), scale=0.25, mask="causal")
        assert_exact(out, q, k, v, 0.25, "causal")


def test_types_promote() -> None:
    q, k, v = qkv(1, (2, 2), (3, 4), 8)
    assert ops.scaled_dot_product_attention(q.bfloat16(), k, v, scale=1.0).dtype == torch.float32
    assert ops.scaled_dot_product_attention(q.bfloat16(), k.half(), v.half(), scale=1.0).dtype == torch.float32
    mask = torch.tensor(2.0, dtype=torch.bfloat16)
    out = ops.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
    assert_exact(out, q, k, v, 1.0)  # one number more for every score changes nothing


@pytest.mark.parametrize("sink", SINKS)
def test_reference_is_exact_in_blocks(sink: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(2, (4, 2), (13, 13), 16)
    sinks = torch.randn(4) if sink else torch.full((4,), -torch.inf)
    for scores in (1, 500, 1 << 24):
        monkeypatch.setattr(attention, "_REFERENCE_SCORES", scores)
        for mask in ("causal", torch.rand(2, 1, 13, 13) > 0.5, torch.randn(13), None):
            out = ops.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask, sinks=sinks)
            assert_exact(out, q, k, v, 0.25, mask, sinks)


def test_gradients() -> None:
    inputs = [t.double().requires_grad_() for t in qkv(1, (2, 1), (3, 4), 4)]
    for args in ({"mask": "causal"}, {"mask": torch.randn(3, 4).double()}, {"sinks": torch.randn(2).double()}):
        assert torch.autograd.gradcheck(lambda *t, a=args: ops.scaled_dot_product_attention(*t, scale=0.5, **a), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "windowed"}, "mask must be 'causal' or a tensor, got 'windowed'"),
        ({"mask": ""}, "mask must be 'causal'"),
        ({"mask": torch.zeros(3, 4)}, "does not broadcast"),
        ({"mask": torch.zeros(2, 1, 5)}, "does not broadcast"),
        ({"mask": torch.zeros(3, 1, 3, 5)}, "does not broadcast"),
        ({"mask": torch.zeros(1, 1, 1, 3, 5)}, "does not broadcast"),
        ({"mask": torch.zeros(3, 5, dtype=torch.float64)}, "would widen"),
        ({"sinks": torch.zeros(5)}, "sinks must have shape"),
        ({"sinks": torch.tensor(0.0)}, "sinks must have shape"),
        ({"sinks": torch.zeros(4, dtype=torch.float64)}, "would widen"),
        ({"q": torch.zeros(4, 3, 8)}, "4 dimensions"),
        ({"q": torch.zeros(2, 4, 3, 8)}, "differ"),
        ({"q": torch.zeros(1, 4, 3, 6)}, "differ"),
        ({"v": torch.zeros(1, 2, 4, 8)}, "differ"),
        ({"v": torch.zeros(1, 1, 5, 8)}, "differ"),
        ({"q": torch.zeros(1, 3, 3, 8)}, "must be a multiple"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    args = {"q": torch.zeros(1, 4, 3, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8)} | change
    with pytest.raises(ValueError, match=message):
        ops.scaled_dot_product_attention(**args, scale=1.0)


def test_half_types_are_not_widened_and_integers_are_refused() -> None:
    q, k, v = qkv(1, (4, 2), (3, 5), 8, torch.float16)
    for given in ({"mask": torch.zeros(3, 5)}, {"sinks": torch.zeros(4)}):
        with pytest.raises(ValueError, match="would widen"):
            ops.scaled_dot_product_attention(q, k, v, scale=1.0, **given)
    with pytest.raises(ValueError, match="must be floating"):
        ops.scaled_dot_product_attention(q.int(), k.int(), v.int(), scale=1.0)


# A flattened batch: (slot, new rows, rows there already).
BATCHES = {
    "decode": [(2, 1, 30), (0, 1, 0), (3, 1, 63)],
    "prompts": [(1, 20, 0), (0, 3, 0)],
    "chunks": [(1, 20, 31), (0, 5, 8), (2, 40, 7)],
    "all at once": [(3, 1, 40), (1, 20, 31), (0, 17, 0), (2, 1, 0)],
    "nothing": [],
}


def cached(batch: str, dtype: torch.dtype, value_dim: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor, ops.Slots]:
    """Rows and caches, with NaN in every place of the caches that no row may read."""
    slots, lengths, offsets = zip(*BATCHES[batch], strict=True) if BATCHES[batch] else ((), (), ())
    positions, where = ops.ragged(slots, lengths, offsets)
    keys, values = torch.full((4, 64, 2, 16), torch.nan), torch.full((4, 64, 2, value_dim), torch.nan)
    for span in where.spans:
        keys[span.slot, : span.context] = torch.randn(span.context, 2, 16)
        values[span.slot, : span.context] = torch.randn(span.context, 2, value_dim)
    q = torch.randn(len(positions), 6, 16)
    return q.to(dtype), keys.to(dtype), values.to(dtype), positions, where


@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("window", [None, 1, 8, 20, 1000])
@pytest.mark.parametrize("sink", SINKS)
def test_cached_attention_is_each_row_alone(batch: str, window: int | None, sink: bool) -> None:
    for dtype in DTYPES:
        q, keys, values, positions, slots = cached(batch, dtype)
        sinks = torch.randn(6).to(dtype) if sink else None
        out = ops.cached_attention(q, keys, values, positions, slots, scale=0.3, window=window, sinks=sinks)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        for row, (position, slot) in enumerate(zip(positions.tolist(), slots.index.tolist(), strict=True)):
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            k, v = (cache[slot, seen].transpose(0, 1)[None] for cache in (keys, values))
            assert_exact(out[row][None, :, None], q[row][None, :, None], k, v, 0.3, sinks=sinks)


def test_cached_attention_value_size_may_differ() -> None:
    q, keys, values, positions, slots = cached("all at once", torch.float32, 24)
    out = ops.cached_attention(q, keys, values, positions, slots, scale=0.3)
    assert out.shape == (len(q), 6, 24)
    assert not out.isnan().any()


def test_cached_attention_never_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys, values, positions, slots = cached("all at once", torch.float32)

    def asked(*args: object) -> None:
        raise AssertionError("a tensor was read back to the host")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, asked)
    ops.cached_attention(q, keys, values, positions, slots, scale=0.3, window=9)


def test_rows_without_a_span_are_zero() -> None:
    q, keys, values, positions, slots = cached("all at once", torch.float32)
    part = ops.Slots(slots.index, slots.spans[:1])
    out = ops.cached_attention(q, keys, values, positions, part, scale=0.3)
    assert out[0].any()
    assert not out[1:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 6, 8)}, "head sizes differ"),
        ({"q": torch.zeros(1, 5, 16)}, "no multiple"),
        ({"q": torch.zeros(6, 16)}, r"q must be \(N, Hq, D\)"),
        ({"q": torch.zeros(1, 6, 16).bfloat16()}, "types differ"),
        ({"v_cache": torch.zeros(2, 32, 2, 16)}, "the caches"),
        ({"positions": torch.zeros(2)}, "positions must be"),
        ({"window": 0}, "window must be at least 1"),
        ({"sinks": torch.zeros(5)}, "sinks must have shape"),
        ({"span": ops.Span(2, 0, 1, 1)}, "outside"),
        ({"span": ops.Span(-1, 0, 1, 1)}, "outside"),
        ({"span": ops.Span(0, 0, 2, 2)}, "outside"),
        ({"span": ops.Span(0, 0, 1, 65)}, "outside"),
        ({"span": ops.Span(0, 0, 1, 0)}, "outside"),
    ],
)
def test_cached_attention_errors(change: dict[str, Any], message: str) -> None:
    cache = torch.zeros(2, 64, 2, 16)
    args = {"q": torch.zeros(1, 6, 16), "k_cache": cache, "v_cache": cache} | change
    args.setdefault("positions", torch.zeros(1, dtype=torch.int64))
    span = args.pop("span", ops.Span(0, 0, 1, 1))
    with pytest.raises(ValueError, match=message):
        ops.cached_attention(**args, slots=ops.Slots(torch.zeros(1, dtype=torch.int64), (span,)), scale=1.0)
