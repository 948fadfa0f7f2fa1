"""Where the sequences of a flattened batch lie, as the kernels are told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gfxlm.kernels.batch import Span

CHUNK = 64


@dataclass(frozen=True, slots=True)
class Sequences:
    """Of each sequence its first row, and the one behind its last."""

    columns: ClassVar[int] = 2

    def entries(self, spans: Sequence[Span]) -> list[tuple[int, ...]]:
        """As `Table` says."""
        return [(span.start, span.stop) for span in spans]

    def most(self, rows: int, spans: int) -> int:
        """As `Table` says."""
        return spans


@dataclass(frozen=True, slots=True)
class Chunks:
    """Of each chunk its first row, and its sequence's first row and the one behind its last."""

    columns: ClassVar[int] = 3

    def entries(self, spans: Sequence[Span]) -> list[tuple[int, ...]]:
        """As `Table` says."""
        return [(row, span.start, span.stop) for span in spans for row in range(span.start, span.stop, CHUNK)]

    def most(self, rows: int, spans: int) -> int:
        """As `Table` says."""
        return -(-rows // CHUNK) + spans
