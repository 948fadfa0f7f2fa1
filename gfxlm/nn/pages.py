"""Keys and values in pages: every slot takes of one pool what it needs, when it needs it."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class Pages:
    """Which page of the pool holds which positions of which slot.

    A store is (count, size, ...). `table`, int32 (slots, pages of the longest context), says on the device where
    position p of a slot lies: in page `table[slot, p // size]` at p % size. Its address is fixed, for recorded steps
    read it. Page 0 belongs to nobody: what a slot does not have lies there, so that a row of a step launched ahead
    of its request's end reads and writes nobody else's.

    A slot is promised pages, and takes them as it grows. Several slots may have a page in common, which none of them
    writes any more. A page that is kept waits, when no slot has it, to be asked for again; the one that has waited
    longest goes first when room is needed, and `dropped` is told.
    """

    def __init__(self, slots: int, max_context: int, size: int, count: int, device: torch.device) -> None:
        self.size = size
        self.count = count
        self.table = torch.zeros(slots, -(-max_context // size), dtype=torch.int32, device=device)
        self.dropped: Callable[[int], None] = lambda page: None
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._promised = [0] * slots  # how many a slot may have in all, at least what it has
        self._holders = [0] * count
        self._kept: set[int] = set()
        self._idle: dict[int, None] = {}  # kept ones that no slot has, the one that has waited longest first
        self._free = set(range(1, count))

    @property
    def free(self) -> int:
        """Pages that no slot has and none is promised."""
        owed = sum(self._promised) - sum(map(len, self._held))
        return len(self._free) + len(self._idle) - owed

    def held(self, slot: int) -> Sequence[int]:
        """A slot's pages in the order of its positions."""
        return self._held[slot]

    def promise(self, slot: int, positions: int, shared: Sequence[int] = ()) -> bool:
        """Let a slot come to have pages for so many positions in all, of which the first are `shared` with others.

        False, and nothing is changed, where there is no room for that.
        """
        wanted = -(-positions // self.size)
        if wanted > self.table.shape[1]:
            return False
        waiting = sum(page in self._idle for page in shared)
        if wanted - self._promised[slot] - len(shared) + waiting > self.free:
            return False
        self._promised[slot] = max(self._promised[slot], wanted)
        if shared:
            self.share(slot, shared)
        return True

    def share(self, slot: int, pages: Sequence[int]) -> None:
        """Let a slot go on with kept pages. It has to be promised as many."""
        for page in pages:
            self._hold(slot, page)
            self._idle.pop(page, None)
        self._publish(slot)

    def reserve(self, slot: int, positions: int) -> bool:
        """Let a slot have pages for so many positions in all; False, and nothing is changed, where too few are free."""
        missing = -(-positions // self.size) - len(self._held[slot])
        if missing <= 0:
            return True
        if not self.promise(slot, positions):
            return False
        self._take(slot, missing)
        self._publish(slot)
        return True

    def release(self, slot: int) -> None:
        """Take a slot's pages back. Its row of the table stays: steps under way may read it, and nobody else does."""
        # The last page waits longest: it is of no use without those before it.
        for page in reversed(self._held[slot]):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._lay_down(page)
        self._held[slot] = []
        self._promised[slot] = 0

    def keep(self, page: int) -> None:
        """Let a page that a slot has wait, when it is released, to be shared."""
        self._kept.add(page)

    def forget(self, page: int) -> None:
        """Keep a page no longer."""
        self._kept.remove(page)
        self.dropped(page)
        if page in self._idle:
            del self._idle[page]
            self._free.add(page)

    def views(self, store: Tensor, slot: int, length: int) -> list[Tensor]:
        """A slot's first `length` positions in a store, (n, ...) for each run of neighbouring pages."""
        views = []
        for first, count in _runs(self._held[slot][: -(-length // self.size)]):
            views.append(store[first : first + count].view(-1, *store.shape[2:])[:length])
            length -= count * self.size
        return views

    def move(self, device: torch.device) -> None:
        """Bring the table to a device."""
        self.table = self.table.to(device)

    def _lay_down(self, page: int) -> None:
        if page in self._kept:
            self._idle[page] = None
        else:
            self._free.add(page)

    def _hold(self, slot: int, page: int) -> None:
        self._holders[page] += 1
        self._held[slot].append(page)

    def _take(self, slot: int, count: int) -> None:
        """Neighbours of the last page as far as they are free: what lies together is one piece to whoever copies it."""
        held = self._held[slot]
        for missing in range(count, 0, -1):
            if not self._free:
                self.forget(next(iter(self._idle)))
            following = held[-1] + 1 if held else 0
            page = following if following in self._free else self._start(missing)
            self._free.remove(page)
            self._hold(slot, page)

    def _start(self, count: int) -> int:
        """Where `count` pages should begin: amid the longest free run, for the slot before it may grow, too."""
        first, length = max(_runs(sorted(self._free)), key=lambda run: run[1])
        return first if first == 1 else first + max(0, min(length // 2, length - count))

    @torch.inference_mode()
    def _publish(self, slot: int) -> None:
        """Write a slot's row of the table, in the order of the stream and without waiting for it."""
        held = self._held[slot]
        row = torch.tensor(held + [0] * (self.table.shape[1] - len(held)), dtype=torch.int32)
        # A buffer for each copy, which torch keeps until it is made: the host may be steps ahead.
        row = row.pin_memory() if self.table.is_cuda else row
        self.table[slot].copy_(row, non_blocking=True)


def _runs(pages: Iterable[int]) -> list[tuple[int, int]]:
    """First page and length of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        first, length = runs[-1] if runs else (page, 0)
        if runs and page == first + length:
            runs[-1] = (first, length + 1)
        else:
            runs.append((page, 1))
    return runs
