"""Keys and values of a fixed number of positions: the first few of a text, and its newest."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.kernels.batch import Span
from gfxlm.ops.ragged import Slots

if TYPE_CHECKING:
    from gfxlm.nn.cache import KVCache, QuantizedKVCache

# Much attention rests on a text's first tokens, whatever they are: without them the rest makes no sense to the model.
KEPT = 4


@dataclass(frozen=True, slots=True)
class Ring:
    """Where a position's keys and values lie in a store of `size` places, and until when.

    The first `KEPT` positions keep their places; all others go round in the places behind, each over the one that is
    `turn` positions older. So the row at position p sees what mlx-lm's `RotatingKVCache` holds: j < KEPT and
    p - turn < j <= p. Keys are turned by their positions' own angles. UserError for a size that leaves no turn.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size <= KEPT:
            raise UserError(
                f"max_kv_size must be at least {KEPT + 1}, as {KEPT} positions are always kept, but is {self.size}"
            )

    @property
    def turn(self) -> int:
        """After how many positions a place is written over."""
        return self.size - KEPT

    def places(self, positions: Tensor) -> Tensor:
        """Where positions lie, int64 like them."""
        return torch.where(positions < self.size, positions, (positions - KEPT) % self.turn + KEPT)

    def held(self, length: int, device: torch.device) -> Tensor:
        """The position that lies at each place once a text has `length` positions, int64 (min(length, size),)."""
        place = torch.arange(min(length, self.size), device=device)
        return torch.where(place < KEPT, place, length - 1 - (length - 1 - place) % self.turn)

    def sees(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Which of the keys' positions each row's position sees, (rows, keys)."""
        row = rows[:, None]
        return (keys <= row) & ((keys < KEPT) | (keys > row - self.turn))


def rearranged(length: int, old: Ring | None, new: Ring | None, device: torch.device) -> Tensor | None:
    """For each place that a text of `length` positions takes in a new cache, its place in an old one.

    None if all agree, as they do before a text goes round. For a ring, None stands for a cache that keeps everything.
    UserError where the new one would need what the old one has not.
    """
    forgotten = old is not None and length > old.size
    if not forgotten and (new is None or length <= new.size):
        return None
    if old is not None and forgotten and (new is None or new.size > old.size):
        raise UserError(
            f"a cache of {old.size} positions (max_kv_size) has forgotten some of the {length} that it went through; "
            "only one that is no larger can go on from it"
        )
    if old == new or new is None:
        return None
    held = new.held(length, device)
    return held if old is None else old.places(held)


@dataclass(frozen=True, slots=True)
class Unrolling:
    """What the rows of one sequence see and where they are stored, where some are written over what others see.

    They are then stored in a copy first, behind what the ring holds, in which nothing is written over. `rows` are the
    sequence's in the batch, `places` theirs in the copy, int64 (n,); `slots` says that they are all of one slot.
    `mask`, (n, places of the copy), is what they see. Of the copy, `newest` goes to the places `stored` of the ring.
    """

    slot: int
    rows: slice
    held: int
    places: Tensor
    slots: Slots
    mask: Tensor
    newest: Tensor
    stored: Tensor

    @classmethod
    def of(cls, ring: Ring, span: Span, device: torch.device) -> "Unrolling":
        """For one sequence of a batch."""
        before, after = span.context - span.rows, span.context
        old, rows = ring.held(before, device), torch.arange(before, after, device=device)
        first = max(before, KEPT, after - ring.turn)
        staying = torch.cat((rows[: max(0, KEPT - before)], rows[first - before :]))
        return cls(
            span.slot,
            slice(span.start, span.stop),
            len(old),
            rows - before + len(old),
            Slots(torch.zeros_like(rows), ()),
            ring.sees(rows, torch.cat((old, rows))),
            staying - before + len(old),
            ring.places(staying),
        )

    def copy(self, cache: "KVCache | QuantizedKVCache") -> "KVCache | QuantizedKVCache":
        """What the ring holds, place by place, and room for the rows, in one slot."""
        copy = cache.alike(self.held + len(self.places))
        where = _where(cache, self.slot, torch.arange(self.held, device=self.places.device))
        for ours, theirs in zip(copy.tensors, cache.tensors, strict=True):
            ours[0, : self.held] = theirs[where]
        return copy

    def store(self, copy: "KVCache | QuantizedKVCache", cache: "KVCache | QuantizedKVCache") -> None:
        """Bring the newest of the rows into the ring."""
        where = _where(cache, self.slot, self.stored)
        for theirs, ours in zip(cache.tensors, copy.tensors, strict=True):
            theirs[where] = ours[0, self.newest]


def _where(cache: "KVCache | QuantizedKVCache", slot: int, places: Tensor) -> tuple[int | Tensor, Tensor]:
    """What to index a cache's tensors with for some places of a slot."""
    if cache.pages is None:
        return slot, places
    return cache.pages.table[slot, places // cache.pages.size].long(), places % cache.pages.size


@dataclass(frozen=True, slots=True)
class Turned:
    """A batch as attention layers have to see it over a ring, in places instead of positions.

    `places`, int64 (N,), is where each row is stored, `last` the last place that it sees, and the contexts of `slots`'
    spans are counted in places. That does for decoding, and until the ring is full. After that, the rows of a chunk are
    written over what others of it see, and all sequences go through `unrollings`; else there are none.
    """

    places: Tensor
    last: Tensor
    slots: Slots
    unrollings: tuple[Unrolling, ...] = ()

    @classmethod
    def of(cls, ring: Ring, positions: Tensor, slots: Slots) -> "Turned":
        """For a batch with spans."""
        spans = [span for span in slots.spans if span.rows]
        overlapping = any(span.rows > 1 and span.context > ring.size for span in spans)
        unrollings = tuple(Unrolling.of(ring, span, positions.device) for span in spans if overlapping)
        inside = tuple(replace(span, context=min(span.context, ring.size)) for span in spans)
        return cls(ring.places(positions), positions.clamp(max=ring.size - 1), Slots(slots.index, inside), unrollings)
