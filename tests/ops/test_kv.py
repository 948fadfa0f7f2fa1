"""Norm, rope and the write of a cache in one call; page tables; what is refused."""

from typing import Any

import pytest
import torch

from gfxlm import ops
from gfxlm.kernels.attention.store import Quantized
from gfxlm.ops import kv
from gfxlm.ops.ragged import Slots, ragged


def rows(heads: int, n: int = 5, size: int = 64) -> torch.Tensor:
    return torch.randn(n, heads, size)


@pytest.mark.parametrize("normed", [False, True])
def test_write_qkv_is_its_parts(normed: bool) -> None:
    q, k, v = rows(4), rows(2), rows(2)
    positions, slots = ragged([1, 0], [3, 2], [4, 0])
    cos, sin = (x[:, None] for x in ops.rope_angles(positions, 32, base=1e4))
    norms = (torch.randn(64), torch.randn(64)) if normed else None
    keys, values = torch.zeros(2, 2, 9, 2, 64)
    out = kv.write_qkv(q, k, v, keys, values, positions, slots, cos=cos, sin=sin, norms=norms, eps=1e-6)
    if norms is not None:
        q, k = ops.rms_norm(q, norms[0], 1e-6), ops.rms_norm(k, norms[1], 1e-6)
    assert torch.equal(out, ops.rotate(q, cos, sin))
    assert torch.equal(keys[slots.index, positions], ops.rotate(k, cos, sin))
    assert torch.equal(values[slots.index, positions], v)


@pytest.mark.parametrize("window", [None, 20])
def test_pages(window: int | None) -> None:
    positions, slots = ragged([1, 0, 2], [3, 1, 40], [30, 47, 0])
    pages = torch.randperm(9).to(torch.int32).view(3, 3)
    paged, plain = torch.full((2, 9, 16, 2, 64), torch.nan), torch.full((2, 3, 48, 2, 64), torch.nan)
    old, q = torch.randn(2, 3, 48, 2, 64), rows(6, len(positions))
    for slot in range(3):
        plain[:, slot] = old[:, slot]
        paged[:, pages[slot].long()] = old[:, slot].unflatten(1, (3, 16))
    k, v = rows(2, len(positions)), rows(2, len(positions))
    kv.write_kv(k, v, *plain, positions, slots)
    kv.write_kv(k, v, *paged, positions, slots, pages=pages)
    wanted = ops.cached_attention(q, *plain, positions, slots, scale=0.1, window=window)
    out = ops.cached_attention(q, *paged, positions, slots, scale=0.1, window=window, pages=pages)
    assert torch.equal(out, wanted)


def test_gate() -> None:
    positions, slots = ragged([0], [5], [0])
    keys, values, q, gate = rows(2)[None], rows(2)[None], rows(4), rows(4)
    plain = ops.cached_attention(q, keys, values, positions, slots, scale=0.1)
    out = ops.cached_attention(q, keys, values, positions, slots, scale=0.1, gate=gate)
    torch.testing.assert_close(out, plain * torch.sigmoid(gate))


def codes(bits: int) -> Quantized:
    return Quantized(torch.zeros(2, 9, 2, 8 * bits, dtype=torch.uint8), torch.zeros(2, 9, 2, 1, 2), bits, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(5, 64)}, r"rows must be \(N, Hkv, D\)"),
        ({"v": torch.zeros(5, 3, 64)}, "rows, heads or head sizes differ"),
        ({"k": torch.zeros(5, 2, 64).half()}, "types differ"),
        ({"positions": torch.zeros(5)}, r"positions must be int64 \(5,\)"),
        ({"slots": Slots(torch.zeros(4, dtype=torch.int64), ())}, r"slots.index must be int64 \(5,\)"),
        ({"k_cache": codes(4)}, "must be stored alike"),
        ({"k_cache": codes(4), "v_cache": codes(8)}, "must be stored alike"),
        ({"pages": torch.zeros(2, 2)}, "pages must be int32"),
        ({"pages": torch.zeros(2, 2, dtype=torch.int32)}, "multiple of 16 positions, got 9"),
        ({"q": torch.zeros(5, 4, 32)}, "does not fit k"),
        ({"cos": torch.zeros(5, 16)}, r"must be \(5, 1, n\)"),
        ({"cos": torch.zeros(5, 1, 40), "sin": torch.zeros(5, 1, 40)}, "2 n at most 64"),
        ({"norms": (torch.zeros(64), torch.zeros(32))}, r"k_norm must be torch.float32 \(64,\)"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    positions, slots = ragged([0], [5], [0])
    args: dict[str, Any] = {"q": rows(4), "k": rows(2), "v": rows(2), "positions": positions, "slots": slots}
    args |= {"k_cache": torch.zeros(2, 9, 2, 64), "v_cache": torch.zeros(2, 9, 2, 64)}
    args |= {"cos": torch.zeros(5, 1, 16), "sin": torch.zeros(5, 1, 16)} | change
    with pytest.raises(ValueError, match=message):
        kv.write_qkv(**args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(5, 4, 32)}, "gate must be"),
        ({"k_cache": codes(8)}, "must be stored alike"),
        ({"pages": torch.zeros(2, 1, dtype=torch.int64)}, "pages must be int32"),
    ],
)
def test_cached_attention_errors(change: dict[str, Any], message: str) -> None:
    positions, slots = ragged([0], [5], [0])
    caches = {"k_cache": torch.zeros(2, 9, 2, 64), "v_cache": torch.zeros(2, 9, 2, 64)}
    with pytest.raises(ValueError, match=message):
        ops.cached_attention(**({"q": rows(4), "positions": positions, "slots": slots, "scale": 1.0} | caches | change))
