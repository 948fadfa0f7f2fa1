"""What kernels are told of a flattened ragged batch: where its sequences lie, in small tables on the device."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from gfxlm.device.mailbox import Mailbox


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's tokens in a flattened batch, in plain host integers.

    `start:stop` are its rows in the batch, `slot` is its place in every cache, and `context` is how many
    positions it has once these rows are in, so the rows sit at positions `context - (stop - start)` onwards.
    A negative slot is padding: its rows are computed with, and no cache is read or written.
    """

    slot: int
    start: int
    stop: int
    context: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


class Table(Protocol):
    """A kind of table: equal objects are one table of a batch. An entry of zeros says nothing."""

    columns: ClassVar[int]

    def entries(self, spans: Sequence[Span]) -> list[tuple[int, ...]]:
        """Its rows, for spans none of which is empty."""
        ...

    def most(self, rows: int, spans: int) -> int:
        """The most entries that `spans` sequences of `rows` rows together can have."""
        ...


class Batch:
    """Sequences laid end to end, and the tables that kernels want of them, each made once."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.spans = tuple(span for span in spans if span.rows)
        self._device = device
        self._tables: dict[Table, Tensor] = {}

    @property
    def longest(self) -> int:
        """The most rows that one of its sequences has."""
        return max((span.rows for span in self.spans), default=0)

    @property
    def sequences(self) -> int:
        """How many it has."""
        return len(self.spans)

    def table(self, kind: Table) -> Tensor:
        """int32 (entries, kind.columns)."""
        if kind not in self._tables:
            entries = kind.entries(self.spans)
            self._tables[kind] = torch.tensor(entries, dtype=torch.int32, device=self._device).view(-1, kind.columns)
        return self._tables[kind]


class RefilledBatch(Batch):
    """A batch of so many rows in up to `sequences` sequences that may become another one behind a recording.

    What it says of its size is what the largest of them would say; tables are padded with entries that say nothing.
    """

    def __init__(self, rows: int, sequences: int, mailbox: Mailbox) -> None:
        super().__init__((), mailbox.device)
        self._rows, self._sequences, self._mailbox = rows, sequences, mailbox

    @property
    def longest(self) -> int:
        return self._rows

    @property
    def sequences(self) -> int:
        return self._sequences

    def table(self, kind: Table) -> Tensor:
        if kind not in self._tables:
            shape = (kind.most(self._rows, self._sequences), kind.columns)
            self._tables[kind] = self._mailbox.tensor(shape, torch.int32)
            self._write(kind)
            self._mailbox.send()
        return self._tables[kind]

    def fill(self, spans: Sequence[Span]) -> None:
        """Become the batch of these spans with the mailbox's next `send`."""
        self.spans = tuple(span for span in spans if span.rows)
        for kind in self._tables:
            self._write(kind)

    def _write(self, kind: Table) -> None:
        table = self._tables[kind]
        numbers = [number for entry in kind.entries(self.spans) for number in entry]
        self._mailbox.write(table, numbers + [0] * (table.numel() - len(numbers)))


@functools.lru_cache(maxsize=16)
def batch_of(spans: tuple[Span, ...], device: torch.device) -> Batch:
    """The batch of these spans: every layer asks for the same."""
    return Batch(spans, device)
