"""Rings against a cache that is written position by position."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfxlm.errors import UserError
from gfxlm.nn.ring import KEPT, Ring, Turned, rearranged
from gfxlm.ops.ragged import ragged

CPU = torch.device("cpu")
sizes, lengths = st.integers(KEPT + 1, 30), st.integers(0, 100)


def written(size: int, length: int) -> list[int]:
    """The position at each place: every one over the oldest that is not one of the first."""
    held: list[int] = []
    for position in range(length):
        if len(held) < size:
            held.append(position)
        else:
            held[held.index(min(held[KEPT:]))] = position
    return held


@given(sizes, lengths)
def test_places(size: int, length: int) -> None:
    ring, positions = Ring(size), torch.arange(length)
    held = written(size, length)
    assert ring.held(length, CPU).tolist() == held
    assert [held[place] for place in ring.places(torch.tensor(held, dtype=torch.int64)).tolist()] == held
    seen = ring.sees(positions, positions)
    for row in range(max(0, length - 3), length):
        assert seen[row].nonzero()[:, 0].tolist() == sorted(written(size, row + 1))


@given(sizes, lengths, st.lists(st.integers(1, 40), max_size=3))
def test_a_batch_in_places(size: int, before: int, more: list[int]) -> None:
    """What decodes needs no more than places; of a chunk that goes round, the newest rows end where they would."""
    ring = Ring(size)
    positions, slots = ragged(range(len(more)), more, [before] * len(more))
    turned = Turned.of(ring, positions, slots)
    assert turned.last.tolist() == [min(p, size - 1) for p in positions.tolist()]
    assert all(span.context <= size for span in turned.slots.spans)
    assert len(turned.unrollings) == (len(more) if any(n > 1 and before + n > size for n in more) else 0)
    for part, count in zip(turned.unrollings, more, strict=False):
        copy = torch.cat((ring.held(before, CPU), torch.arange(before, before + count)))
        assert copy[part.places].tolist() == list(range(before, before + count))
        places = written(size, before) + [-1] * max(0, min(size, before + count) - before)
        for place, source in zip(part.stored.tolist(), part.newest.tolist(), strict=True):
            places[place] = int(copy[source])
        assert places == written(size, before + count)
        for row, mask in zip(range(before, before + count), part.mask, strict=True):
            assert sorted(copy[mask].tolist()) == sorted(written(size, row + 1))


@given(st.none() | sizes, st.none() | sizes, lengths)
def test_rearranged(old: int | None, new: int | None, length: int) -> None:
    there, wanted = (list(range(length)) if size is None else written(size, length) for size in (old, new))
    rings = [None if size is None else Ring(size) for size in (old, new)]
    if not set(wanted) <= set(there):
        with pytest.raises(UserError, match=f"has forgotten some of the {length}"):
            rearranged(length, *rings, CPU)
        return
    order = rearranged(length, *rings, CPU)
    assert (there if order is None else [there[place] for place in order.tolist()]) == wanted
