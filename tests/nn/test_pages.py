"""The book of pages: no page is anybody's twice, none is lost, and the table says what the book says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfxlm.errors import UserError
from gfxlm.nn.cache import Cache, KVCache, KVFormat, QuantizedKVCache, RecurrentCache
from gfxlm.nn.pages import Pages
from gfxlm.ops import kv
from gfxlm.ops.ragged import ragged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, CONTEXT, SIZE = 4, 70, 16


def held(pages: Pages, slot: int) -> list[int]:
    return [page for page in pages.table[slot].tolist() if page]


@settings(deadline=None)
@given(
    st.integers(2, 24),
    st.lists(st.tuples(st.integers(0, SLOTS - 1), st.none() | st.integers(0, CONTEXT + 20)), max_size=40),
)
def test_books(count: int, calls: list[tuple[int, int | None]]) -> None:
    pages = Pages(SLOTS, CONTEXT, SIZE, count, DEVICE)
    address = pages.table.data_ptr()
    owned: list[list[int]] = [[] for _ in range(SLOTS)]
    for slot, positions in calls:
        if positions is None:
            pages.release(slot)
            owned[slot] = []
        else:
            before, free = pages.table.tolist(), pages.free
            missing = -(-positions // SIZE) - len(owned[slot])
            possible = missing <= free and -(-positions // SIZE) <= pages.table.shape[1]
            assert pages.reserve(slot, positions) == (missing <= 0 or possible)
            if missing > 0 and possible:
                now = held(pages, slot)
                assert now[: len(owned[slot])] == owned[slot]
                assert len(now) == len(owned[slot]) + missing
                owned[slot] = now
            else:
                assert pages.table.tolist() == before
            others = [row for number, row in enumerate(before) if number != slot]
            assert [row for number, row in enumerate(pages.table.tolist()) if number != slot] == others
        taken = [page for slot_pages in owned for page in slot_pages]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(1, count))
        assert pages.free == count - 1 - len(taken)
    assert pages.table.data_ptr() == address


def test_neighbours_are_preferred() -> None:
    pages = Pages(3, 16 * SIZE, SIZE, 33, DEVICE)
    assert pages.reserve(0, 3 * SIZE)
    assert pages.reserve(1, 4 * SIZE)
    for more in (4, 8):  # both can grow
        assert pages.reserve(0, more * SIZE)
        assert pages.reserve(1, (more + 1) * SIZE)
    for slot in (0, 1):
        first, *others = held(pages, slot)
        assert others == list(range(first + 1, first + 1 + len(others)))


def paged(context: int = CONTEXT, count: int = 12) -> Cache:
    pages = Pages(3, context, SIZE, count, DEVICE)
    layer = KVCache.allocate(3, context, 2, 64, torch.float32, DEVICE, pages=pages)
    for tensor in layer.tensors:
        tensor.fill_(torch.nan)
    return Cache([layer], [0] * 3, context, pages=pages)


def contiguous(lengths: list[int]) -> Cache:
    layer = KVCache.allocate(len(lengths), CONTEXT, 2, 64, torch.float32, DEVICE)
    for tensor in layer.tensors:
        tensor.normal_()
    return Cache([layer], lengths, CONTEXT)


def stores(cache: Cache) -> tuple[KVCache | QuantizedKVCache, torch.Tensor | None]:
    layer = cache.layers[0]
    assert not isinstance(layer, RecurrentCache)
    return layer, layer.table


def scattered() -> Cache:
    """With a slot 2 whose pages are not neighbours."""
    cache = paged(count=9)
    assert cache.reserve(0, SIZE)
    assert cache.reserve(1, SIZE)
    assert cache.reserve(2, 2 * SIZE)
    cache.release(0)
    assert cache.reserve(2, 5 * SIZE - 10)
    assert [b - a for a, b in zip(held(cache.pages, 2), held(cache.pages, 2)[1:], strict=False)] != [1] * 4  # type: ignore[arg-type]
    return cache


def test_a_cache_without_pages_has_its_whole_context() -> None:
    cache = contiguous([3, 0])
    assert cache.reserve(0, CONTEXT)
    assert not cache.reserve(0, CONTEXT + 1)
    cache.release(0)
    assert cache.lengths == [0, 0]


def test_a_context_is_no_longer_than_said() -> None:
    cache = paged()
    assert not cache.reserve(0, CONTEXT + 1)
    assert cache.reserve(0, CONTEXT)
    assert cache.nbytes == 2 * 12 * SIZE * 2 * 64 * 4 + 4 * 3 * 5


def test_slots_are_copied_in_and_out() -> None:
    source, target, back = contiguous([0, 60]), scattered(), contiguous([0, 0])
    target.copy_slot(2, source, 1)
    back.copy_slot(0, target, 2)
    assert (target.lengths, back.lengths) == ([0, 0, 60], [60, 0])
    for ours, theirs in zip(back.layers[0].tensors, source.layers[0].tensors, strict=True):
        assert torch.equal(ours[0, :60], theirs[1, :60])
    for tensor, theirs in zip(target.layers[0].tensors, source.layers[0].tensors, strict=True):
        assert torch.equal(target.stored(tensor, 2), theirs[1, :60])
        assert target.stored(tensor, 0).shape == (0, 2, 64)


def test_rows_are_written_where_the_copy_puts_them() -> None:
    source, target = contiguous([60]), scattered()
    layer, table = stores(target)
    rows, _ = stores(source)
    assert not isinstance(rows, QuantizedKVCache)
    positions, slots = ragged([2], [60], [0], DEVICE)
    layer.write(rows.keys[0, :60], rows.values[0, :60], positions, slots)
    target.lengths[2] = 60
    assert torch.equal(target.stored(layer.tensors[0], 2), rows.keys[0, :60])
    for first, last in ((0, 60), (0, 16), (17, 33), (40, 60)):
        assert torch.equal(kv.read(layer.keys, 2, first, last, table), rows.keys[0, first:last])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU nobody looks at the table")
def test_neighbours_are_read_in_place() -> None:
    store = torch.randn(9, SIZE, 2, 64)
    neighbours, others = torch.tensor([[4, 5, 6], [4, 6, 5]], dtype=torch.int32)
    for numbers, in_place in ((neighbours, True), (others, False)):
        rows = kv.read(store, 0, 3, 40, numbers[None])
        assert torch.equal(rows, store[numbers.long()].flatten(0, 1)[3:40])
        assert (rows.untyped_storage().data_ptr() == store.untyped_storage().data_ptr()) == in_place


def test_no_room_for_a_copy() -> None:
    source, target = contiguous([60]), paged(count=4)
    with pytest.raises(UserError, match="no room for the 60 positions"):
        target.copy_slot(0, source, 0)
    assert target.lengths[0] == 0


def test_pages_are_quantised_as_slots_are() -> None:
    source, target = contiguous([60, 0, 0]), scattered()
    target.copy_slot(2, source, 0)
    for cache in (source, target):
        cache.quantize(KVFormat(4, 32))
    (ours, table), (theirs, _) = stores(target), stores(source)
    for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        assert torch.equal(kv.read(a, 2, 0, 60, table), kv.read(b, 0, 0, 60))
    back = contiguous([0])
    back.copy_slot(0, target, 2)
    assert torch.equal(back.layers[0].tensors[0][0, :60], kv.read(theirs.keys, 0, 0, 60))


def test_table_moves_with_its_cache() -> None:
    cache = paged()
    cache.reserve(1, 20)
    row = cache.pages.table[1].tolist()  # type: ignore[union-attr]
    cache.move(torch.device("cpu"))
    layer, table = stores(cache)
    assert table is not None
    assert {tensor.device.type for tensor in (*layer.tensors, table)} == {"cpu"}
    assert table[1].tolist() == row
    assert cache.reserve(1, 60)
    assert layer.table is not None
    assert len([page for page in layer.table[1].tolist() if page]) == 4


def test_what_is_not_reserved_lies_in_nobodys_page() -> None:
    """A row of a step launched ahead of its request's end is written past what the slot has."""
    cache = paged()
    assert cache.reserve(0, SIZE)
    assert cache.reserve(1, SIZE)
    layer, table = stores(cache)
    assert table is not None
    positions, slots = ragged([0], [1], [SIZE], DEVICE)
    layer.write(torch.ones(1, 2, 64, device=DEVICE), torch.ones(1, 2, 64, device=DEVICE), positions, slots)
    written = [page for page in range(12) if not layer.tensors[0][page].isnan().all()]
    assert written == [0]
