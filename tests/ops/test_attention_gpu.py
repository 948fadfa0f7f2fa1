"""Which kernel takes what on a GPU, by its numbers: under Triton's interpreter where there is none."""

import itertools

import pytest
import torch
from torch import Tensor

from gfxlm.device.arch import named
from gfxlm.kernels.launch import recording
from gfxlm.ops import attention_gpu, kv, scaled_dot_product_attention
from gfxlm.ops.ragged import Slots, Span, ragged
from tests.kernels.attention.oracle import DEVICE, assert_near, causal, exact, store

# Slots, new rows of each, rows that are there already.
BATCHES = {
    "decode": ([2, 0, 3], [1, 1, 1], [30, 0, 63]),
    "prompts": ([1, 0], [20, 3], [0, 0]),
    "chunks and decode": ([1, 0, 2, 3], [20, 1, 1, 12], [31, 8, 40, 0]),
    "a few rows each": ([1, 0, 2], [3, 3, 5], [20, 0, 50]),
    "nothing": ([], [], []),
}


@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize(("window", "gated", "bits"), [(None, True, 16), (20, False, 16), (None, False, 4)])
def test_cached(batch: str, window: int | None, gated: bool, bits: int) -> None:
    positions, slots = ragged(*BATCHES[batch], DEVICE)
    keys, values = (store((4, 64, 2, 64), torch.float32, bits) for _ in range(2))
    q = torch.randn(len(positions), 6, 64, device=DEVICE)
    gate = torch.randn_like(q) if gated else None
    out = attention_gpu.cached(
        q, keys, values, positions, slots, scale=0.125, window=window, sinks=None, gate=gate, pages=None
    )
    assert out.shape == q.shape
    for span in slots.spans:
        rows = slice(span.start, span.stop)
        k, v = (kv.read(cache, span.slot, 0, span.context) for cache in (keys, values))
        wanted = exact(q[rows], k, v, causal(positions[rows], span.context, window), 0.125)
        if gate is not None:
            wanted = tuple(x * torch.sigmoid(gate[rows].double()) for x in wanted)
        assert_near(out[rows], wanted)


def test_rows_of_nobody_are_zero() -> None:
    keys = torch.randn(2, 30, 2, 64, device=DEVICE)
    q = torch.randn(20, 4, 64, device=DEVICE)
    positions, slots = torch.arange(20, device=DEVICE), torch.zeros(20, dtype=torch.int64, device=DEVICE)
    spans = (Span(0, 1, 2, 2), Span(0, 4, 15, 15))
    out = attention_gpu.cached(
        q, keys, keys, positions, Slots(slots, spans), scale=0.125, window=None, sinks=None, gate=None, pages=None
    )
    covered = torch.zeros(20, dtype=torch.bool)
    covered[1], covered[4:15] = True, True
    assert torch.equal(out.flatten(1).any(1).cpu(), covered)


def test_decode_reads_no_host_lengths() -> None:
    """A captured call is replayed with other positions and slots than its spans say."""
    keys, values = torch.randn(2, 3, 40, 2, 64, device=DEVICE)
    q = torch.randn(3, 4, 64, device=DEVICE)
    positions, index = torch.tensor([30, 7, 9], device=DEVICE), torch.tensor([1, -1, 2], device=DEVICE)
    spans = tuple(Span(0, i, i + 1, 1) for i in range(3))
    out = attention_gpu.cached(
        q, keys, values, positions, Slots(index, spans), scale=0.125, window=None, sinks=None, gate=None, pages=None
    )
    assert not out[1].any()
    for row, slot in ((0, 1), (2, 2)):
        rows = slice(row, row + 1)
        assert_near(out[rows], exact(q[rows], keys[slot], values[slot], causal(positions[rows], 40), 0.125))


def layouts(x: Tensor) -> list[Tensor]:
    return [x, x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT, torch.cat((x, x), 3)[..., 64:]]


@pytest.mark.parametrize(("rows", "keys"), [(1, 50), (20, 50), (50, 50), (60, 50), (0, 5), (5, 0)])
def test_dense(rows: int, keys: int) -> None:
    q, k, v = (torch.randn(2, h, n, 64, device=DEVICE) for h, n in ((4, rows), (2, keys), (2, keys)))
    sinks, added = torch.randn(4, device=DEVICE), torch.randn(4, 1, keys, device=DEVICE)[None]
    shown = torch.rand(1, 1, rows, keys, device=DEVICE) > 0.3
    for i, (is_causal, mask, sink) in enumerate(itertools.product((True, False), (None, added, shown), (None, sinks))):
        if is_causal and mask is not None:
            continue
        given = (layouts(x)[i % 4] for x in (q, k, v))
        out = attention_gpu.dense(*given, scale=0.125, causal=is_causal, mask=mask, sinks=sink)
        assert out.shape == q.shape
        if 0 in (rows, keys):
            assert not out.any()
            continue
        everything = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=DEVICE)
        seen = causal(torch.arange(keys - rows, keys, device=DEVICE), keys)[None, None] if is_causal else everything
        seen = shown if mask is shown else seen
        for b in range(2):
            ours = (x[b].transpose(0, 1) for x in (q, k, v))
            wanted = exact(*ours, seen[0], 0.125, added[0] if mask is added else None, sink)
            assert_near(out[b].transpose(0, 1), wanted)


@pytest.mark.skipif(DEVICE == "cpu", reason="torch has its fused kernels on a GPU")
def test_torchs_kernel_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    positions, slots = ragged([1, 0], [4096, 10], [0, 0], DEVICE)
    keys, values = torch.randn(2, 2, 5000, 2, 128, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randn(4106, 4, 128, device=DEVICE, dtype=torch.bfloat16)
    gate = torch.randn_like(q)
    args = {"scale": 0.1, "window": None, "sinks": None, "gate": gate, "pages": None}
    by_table = attention_gpu.cached(q, keys, values, positions, slots, **args)
    monkeypatch.setattr(attention_gpu, "_of_torch", lambda *_: None)
    ours = attention_gpu.cached(q, keys, values, positions, slots, **args)
    torch.testing.assert_close(by_table, ours, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("heads", [1, 6])
def test_heads_that_lie_far_apart(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, n, 20, 64, device=DEVICE) for n in (6, 2, 2))
    mask, sinks = torch.randn(1, heads, 20, 20, device=DEVICE), torch.randn(6, device=DEVICE)
    together = attention_gpu.dense(q, k, v, scale=0.125, causal=False, mask=mask, sinks=sinks)
    monkeypatch.setattr(attention_gpu, "_MOST_APART", 2000)
    apart = attention_gpu.dense(q, k, v, scale=0.125, causal=False, mask=mask, sinks=sinks)
    assert (apart - together).abs().max() <= 1e-5


def test_a_mask_of_more_entries_than_32_bits_count() -> None:
    q, k = (torch.empty(1, n, 16384, 64, dtype=torch.bfloat16, device="meta") for n in (40, 8))
    mask = torch.empty(1, 40, 16384, 16384, dtype=torch.bfloat16, device="meta")
    with recording(named("gfx942")) as launches:
        assert scaled_dot_product_attention(q, k, k, scale=0.125, mask=mask).shape == q.shape
    for launch in launches:
        given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
        assert launch.constants["heads"] * given["stride_mask_head"] < 1 << 31
