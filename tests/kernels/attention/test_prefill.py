"""Flash attention of many rows against float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gfxlm.kernels.attention.prefill import prefill
from gfxlm.kernels.batch import Batch, Span
from gfxlm.kernels.tuning import override
from tests.kernels.attention.oracle import DEVICE, assert_near, causal, exact, numbers, store, table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Shape:
    """Heads (Hq, Hkv), head size of keys and of values, and runs of (slot, rows, keys)."""

    heads: tuple[int, int]
    sizes: tuple[int, int]
    runs: tuple[tuple[int, int, int], ...]
    window: int | None = None
    sinks: bool = False
    gate: bool = False
    bits: int = 16
    group_size: int = 32
    page: int = 0
    chunk: int = 1024


SHAPES = {
    "chunks and prompts": Shape((6, 2), (64, 64), ((2, 50, 130), (0, 20, 20), (1, 1, 7))),
    "a sink and a gate": Shape((4, 4), (80, 80), ((1, 40, 90),), sinks=True, gate=True),
    "a window within one tile": Shape((4, 1), (96, 64), ((0, 60, 130),), window=5, sinks=True),
    "a window over tiles": Shape((4, 2), (64, 80), ((0, 70, 150), (2, 9, 9)), window=70),
    "one key a row": Shape((2, 2), (64, 64), ((0, 40, 60),), window=1),
    "twenty heads to a key head": Shape((20, 1), (64, 64), ((0, 9, 100),)),
    "seventeen heads to a key head": Shape((17, 1), (64, 64), ((0, 9, 40),)),
    "heads of 128": Shape((8, 2), (128, 128), ((1, 33, 100),), gate=True),
    "heads of 256": Shape((8, 1), (256, 256), ((1, 10, 70),)),
    "heads in chunks": Shape((4, 2), (96, 96), ((0, 40, 110),), chunk=32, window=60),
    "pages": Shape((4, 2), (64, 64), ((2, 20, 90), (0, 30, 30)), page=16),
    "pages and a window": Shape((4, 2), (64, 64), ((2, 20, 90), (0, 30, 30)), page=48, window=33),
    "codes of 8 bits": Shape((4, 2), (64, 128), ((2, 20, 90), (0, 30, 30)), bits=8, group_size=64),
    "codes of 4 bits": Shape((4, 2), (128, 64), ((2, 20, 90), (0, 30, 30)), bits=4, group_size=64),
    "codes of 96 features in chunks": Shape((2, 2), (96, 96), ((1, 20, 90),), bits=4, chunk=32),
    "codes in pages": Shape((4, 2), (128, 128), ((1, 20, 90),), bits=4, group_size=128, page=32),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_of_a_batch(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    (heads, kv_heads), (size, value_size) = shape.heads, shape.sizes
    pages = table(3, -(-150 // shape.page)) if shape.page else None
    places = (3, 150) if pages is None else (pages.numel(), shape.page)
    k = store((*places, kv_heads, size), dtype, shape.bits, shape.group_size)
    v = store((*places, kv_heads, value_size), dtype, shape.bits, shape.group_size)
    n = sum(rows for _, rows, _ in shape.runs) + 1  # and a row of nobody
    q = torch.randn(n, heads, size).to(dtype).to(DEVICE)
    sinks = torch.randn(heads, 2).to(dtype).to(DEVICE)[:, 1] if shape.sinks else None
    gate = torch.randn(n, heads, 2 * value_size).to(dtype).to(DEVICE)[..., value_size:] if shape.gate else None
    out = torch.full((n, heads, value_size), torch.nan, dtype=dtype, device=DEVICE)
    runs, start = [], 0
    for slot, rows, keys in shape.runs:
        runs.append(Span(slot, start, start + rows, keys))
        start += rows
    tiles = {"BLOCK_M": 32, "BLOCK_N": 32, "CHUNK": shape.chunk, "options": {"num_warps": 4}}
    with override("attention_prefill", tiles):
        prefill(
            q[None], k, v, out[None], Batch(runs, q.device),
            scale=size**-0.5, window=shape.window, sinks=sinks, gate=gate, pages=pages,
        )  # fmt: skip
    for span in runs:
        part, keys = slice(span.start, span.stop), span.context
        seen = causal(torch.arange(keys - span.rows, keys, device=DEVICE), keys, shape.window)
        wanted = exact(q[part], *(numbers(x, span.slot, keys, pages) for x in (k, v)), seen, size**-0.5, sinks=sinks)
        if gate is not None:
            wanted = tuple(x * torch.sigmoid(gate[part].double()) for x in wanted)
        assert_near(out[part], wanted)
    assert out[-1].isnan().all()


def masks(rows: int, keys: int) -> dict[str, Tensor]:
    visible = torch.rand(2, 4, rows, keys) > 0.4
    visible[:, :, rows // 2] = False
    return {
        "shown": visible,
        "shown per key": visible[:1, :1, :1].expand(2, 4, rows, keys),
        "added": torch.randn(2, 4, rows, keys),
        "added, with nothing": visible[0, 0].float().log().expand(2, 4, rows, keys),
        "added, as low as can be": visible[:1].float().sub(1).mul(torch.finfo(torch.float32).max).expand(2, 4, -1, -1),
    }


@pytest.mark.parametrize("name", masks(1, 1))
@pytest.mark.parametrize("sink", [False, True])
def test_masks(name: str, sink: bool) -> None:
    rows, keys = 37, 70
    mask = masks(rows, keys)[name].to(DEVICE)
    q, k, v = (torch.randn(2, n, h, 80, device=DEVICE)[..., :64] for n, h in ((rows, 4), (keys, 2), (keys, 2)))
    sinks = torch.randn(4, device=DEVICE) if sink else None
    out = torch.full((2, rows, 4, 64), torch.nan, device=DEVICE)
    batch = Batch([Span(slot, 0, rows, keys) for slot in range(2)], q.device)
    prefill(q, k, v, out, batch, scale=0.125, causal=False, mask=mask, sinks=sinks)
    everything = torch.ones((), dtype=torch.bool, device=DEVICE)
    for slot in range(2):
        shown = mask.dtype == torch.bool
        seen, added = (mask[slot], None) if shown else (everything, mask[slot])
        assert_near(out[slot], exact(q[slot], k[slot], v[slot], seen, 0.125, added, sinks))
        if name in ("shown", "added, with nothing"):
            assert not out[slot, rows // 2].any()


def test_all_keys_for_all_rows() -> None:
    q, k, v = (torch.randn(2, n, 3, 64, device=DEVICE) for n in (20, 75, 75))
    out = torch.full_like(q, torch.nan)
    batch = Batch([Span(slot, 0, 20, 75) for slot in range(2)], q.device)
    prefill(q, k, v, out, batch, scale=0.1, causal=False)
    for slot in range(2):
        assert_near(out[slot], exact(q[slot], k[slot], v[slot], torch.ones((), dtype=torch.bool, device=DEVICE), 0.1))


def test_more_rows_than_keys() -> None:
    q, k, v = (torch.randn(1, n, 2, 64, device=DEVICE) for n in (70, 35, 35))
    out = torch.full_like(q, torch.nan)
    prefill(q, k, v, out, Batch([Span(0, 0, 70, 35)], q.device), scale=0.1)
    assert not out[0, :35].any()
    assert_near(out[0, 35:], exact(q[0, 35:], k[0], v[0], causal(torch.arange(35, device=DEVICE), 35), 0.1))


def test_nothing() -> None:
    q = torch.empty(1, 0, 2, 64, device=DEVICE)
    k, v = torch.empty(2, 1, 8, 2, 64, device=DEVICE)
    prefill(q, k, v, q, Batch([], q.device), scale=1.0)
