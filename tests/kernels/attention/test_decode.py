"""Split-key attention of a row or a few a sequence against float64."""

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

from gfxlm.kernels.attention.decode import decode
from gfxlm.kernels.attention.join import share
from gfxlm.kernels.tuning import override
from tests.kernels.attention.oracle import DEVICE, assert_near, causal, exact, numbers, store, table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Shape:
    """Heads (Hq, Hkv), head size of keys and of values, and sequences of (slot, keys with these rows)."""

    heads: tuple[int, int]
    sizes: tuple[int, int]
    sequences: tuple[tuple[int, int], ...]
    queries: int = 1
    window: int | None = None
    sinks: bool = False
    gate: bool = False
    bits: int = 16
    group_size: int = 32
    page: int = 0
    chunk: int = 1024


SHAPES = {
    "lengths": Shape((6, 2), (64, 64), ((2, 150), (0, 1), (-1, 40), (1, 33))),
    "a sink and a gate": Shape((4, 4), (80, 80), ((1, 90), (0, 3)), sinks=True, gate=True),
    "a window": Shape((4, 1), (96, 64), ((0, 130), (2, 20)), window=40, sinks=True),
    "sixteen heads to a key head": Shape((16, 1), (64, 64), ((0, 150),), gate=True),
    "forty heads to a key head": Shape((34, 1), (64, 64), ((0, 50),)),
    "heads of 128": Shape((8, 2), (128, 128), ((1, 110),)),
    "heads of 256": Shape((8, 1), (256, 256), ((1, 70),), gate=True),
    "heads in chunks": Shape((4, 2), (96, 96), ((0, 110),), chunk=32),
    "three rows each": Shape((4, 2), (64, 64), ((1, 100), (0, 3), (-1, 9)), queries=3),
    "eight rows and a window": Shape((2, 1), (64, 64), ((1, 100), (0, 8)), queries=8, window=35, gate=True),
    "pages": Shape((4, 2), (64, 64), ((2, 90), (0, 30), (-1, 5)), page=16, sinks=True),
    "pages of two tiles": Shape((4, 2), (64, 64), ((2, 150), (0, 33), (-1, 5), (1, 32)), page=32, gate=True),
    "pages and a window": Shape((4, 2), (64, 64), ((2, 150), (0, 33)), page=32, window=50),
    "three rows each in pages": Shape((4, 2), (64, 64), ((1, 100), (0, 33), (-1, 9)), queries=3, page=16),
    "codes of 8 bits": Shape((4, 2), (64, 128), ((2, 90), (0, 31)), bits=8, group_size=64),
    "codes of 4 bits": Shape((4, 2), (128, 64), ((2, 90), (0, 31)), bits=4, group_size=64),
    "codes of 96 features in chunks": Shape((2, 2), (96, 96), ((1, 90),), bits=8, chunk=32),
    "codes in pages": Shape((4, 2), (128, 128), ((1, 90),), bits=4, group_size=128, page=32),
}


def attend(shape: Shape, dtype: torch.dtype, programs: int) -> None:
    (heads, kv_heads), (size, value_size) = shape.heads, shape.sizes
    pages = table(3, -(-150 // shape.page)) if shape.page else None
    places = (3, 150) if pages is None else (pages.numel(), shape.page)
    k = store((*places, kv_heads, size), dtype, shape.bits, shape.group_size)
    v = store((*places, kv_heads, value_size), dtype, shape.bits, shape.group_size)
    if shape.bits == 16 and pages is None:
        for slot in range(3):  # nobody may read what is not there yet
            last = max([keys for s, keys in shape.sequences if s == slot], default=0)
            k[slot, last:], v[slot, last:] = torch.nan, torch.nan
    n = shape.queries * len(shape.sequences)
    q = torch.randn(n, heads, size + 16).to(dtype).to(DEVICE)[..., 16:]
    sinks = torch.randn(heads, 2).to(dtype).to(DEVICE)[:, 1] if shape.sinks else None
    gate = torch.randn(n, heads, 2 * value_size).to(dtype).to(DEVICE)[..., value_size:] if shape.gate else None
    out = torch.full((n, heads, value_size), torch.nan, dtype=dtype, device=DEVICE)
    positions = [torch.arange(keys - shape.queries, keys) for _, keys in shape.sequences]
    slots = torch.tensor([slot for slot, _ in shape.sequences]).repeat_interleave(shape.queries)
    sizes = {"BLOCK_N": 16, "programs": programs, "BLOCK_DV": 32, "CHUNK": shape.chunk, "options": {}, "join": {}}
    with override("attention_decode", sizes):
        decode(
            q, k, v, out, torch.cat(positions).to(DEVICE), slots.to(DEVICE),
            scale=size**-0.5, queries=shape.queries, window=shape.window, sinks=sinks, gate=gate, pages=pages,
        )  # fmt: skip
    for i, (slot, keys) in enumerate(shape.sequences):
        part = slice(i * shape.queries, (i + 1) * shape.queries)
        if slot < 0:
            assert not out[part].any()
            continue
        seen = causal(positions[i].to(DEVICE), keys, shape.window)
        wanted = exact(q[part], *(numbers(x, slot, keys, pages) for x in (k, v)), seen, size**-0.5, sinks=sinks)
        if gate is not None:
            wanted = tuple(x * torch.sigmoid(gate[part].double()) for x in wanted)
        assert_near(out[part], wanted)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences(name: str, dtype: torch.dtype) -> None:
    attend(SHAPES[name], dtype, programs=24)


@pytest.mark.parametrize("name", ["lengths", "a sink and a gate", "a window", "three rows each", "pages"])
@pytest.mark.parametrize("programs", [1, 7, 10_000])
def test_any_number_of_splits(name: str, programs: int) -> None:
    attend(SHAPES[name], torch.float32, programs)


def test_nothing() -> None:
    q, none = torch.empty(0, 2, 64, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    decode(q, torch.empty(1, 8, 2, 64), torch.empty(1, 8, 2, 64), q, none, none, scale=1.0)


@triton.jit
def _shares_kernel(p_positions, p_shares, splits, window: tl.constexpr, BLOCK_N: tl.constexpr):
    i_split = tl.program_id(0)
    first, last, _ = share(p_positions, 0, i_split, 1, window, splits, BLOCK_N)
    tl.store(p_shares + 2 * i_split, first)
    tl.store(p_shares + 2 * i_split + 1, last)


@pytest.mark.parametrize(("context", "splits", "window"), [(1, 4, 0), (33, 4, 0), (257, 16, 0), (300, 7, 100)])
def test_splits_have_equal_shares_of_all_keys(context, splits, window):
    shares = torch.zeros(splits, 2, dtype=torch.int32, device=DEVICE)
    _shares_kernel[(splits,)](torch.tensor([context - 1], device=DEVICE), shares, splits, window, 16)
    shares = [pair for pair in shares.tolist() if pair[0] < pair[1]]
    start = max(context - window, 0) if window else 0
    assert [key for pair in shares for key in range(*pair)] == list(range(start, context))
    blocks = [-(-(last - first) // 16) for first, last in shares]
    assert len(shares) == min(splits, sum(blocks))
    assert max(blocks) - min(blocks) <= 1
    assert shares[0][0] == start  # whose program has the sink
