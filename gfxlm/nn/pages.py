"""Keys and values in pages: every slot takes of one pool what it needs, when it needs it."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Pages:
    """Which page of the pool holds which positions of which slot.

    A store is (count, size, ...). `table`, int32 (slots, pages of the longest context), says on the device where
    position p of a slot lies: in page `table[slot, p // size]` at p % size. Its address is fixed, for recorded steps
    read it. Page 0 belongs to nobody: what a slot has not reserved lies there, so that a row of a step launched ahead
    of its request's end reads and writes nobody else's.
    """

    def __init__(self, slots: int, max_context: int, size: int, count: int, device: torch.device) -> None:
        self.size = size
        self.count = count
        self.table = torch.zeros(slots, -(-max_context // size), dtype=torch.int32, device=device)
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._free = set(range(1, count))

    @property
    def free(self) -> int:
        """Pages that no slot has."""
        return len(self._free)

    def reserve(self, slot: int, positions: int) -> bool:
        """Let a slot have pages for so many positions in all; False, and nothing is changed, where too few are free."""
        held = self._held[slot]
        missing = -(-positions // self.size) - len(held)
        if missing <= 0:
            return True
        if missing > len(self._free) or len(held) + missing > self.table.shape[1]:
            return False
        self._take(held, missing)
        self._publish(slot)
        return True

    def release(self, slot: int) -> None:
        """Take a slot's pages back. Its row of the table stays: steps under way may read it, and nobody else does."""
        self._free.update(self._held[slot])
        self._held[slot] = []

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

    def _take(self, held: list[int], count: int) -> None:
        """Neighbours of the last page as far as they are free: what lies together is one piece to whoever copies it."""
        for missing in range(count, 0, -1):
            following = held[-1] + 1 if held else 0
            page = following if following in self._free else self._start(missing)
            self._free.remove(page)
            held.append(page)

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
