"""Feeding prompts: chunks of rows of several sequences, recorded per number of rows where the device can do that."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.device.graph import Graph, Pool
from gfxlm.device.mailbox import Mailbox
from gfxlm.kernels.batch import RefilledBatch, Span
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache
from gfxlm.ops.ragged import Slots, ragged

# Kernels are compiled apart for numbers of rows that are multiples of this and for others.
_STEP = 16
# Steps of the numbers of rows below it, where chunks of so few are many.
_SMALL_STEP = 4


@dataclass(frozen=True, slots=True)
class Fed:
    """Rows that the model has been given: normed hidden states (N, D), and each row's position and slot, (N,)."""

    hidden: Tensor
    positions: Tensor
    slots: Tensor
    spans: tuple[Span, ...]

    def at(self, rows: Sequence[int]) -> "tuple[Tensor, Tensor, Tensor]":
        """Hidden states, positions and slots of some rows."""
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):  # a view: nothing to launch
            span = slice(rows[0], rows[0] + len(rows))
            return self.hidden[span], self.positions[span], self.slots[span]
        index = torch.tensor(rows, device=self.hidden.device)
        return self.hidden[index], self.positions[index], self.slots[index]


class PaddedChunk:
    """A chunk of up to `rows` rows of up to `sequences` sequences, in tensors of fixed address."""

    def __init__(self, rows: int, sequences: int, device: torch.device) -> None:
        # Three numbers of 64 bits a row, and tables: the longest has five of 32 bits a row and sequence.
        self._mailbox = Mailbox(16 * (rows + sequences), device)
        self.tokens, self.positions, self.slots = (self._mailbox.tensor((rows,), torch.int64) for _ in range(3))
        self._batch = RefilledBatch(rows, sequences, self._mailbox)

    def fill(self, tokens: Sequence[int], spans: Sequence[Span]) -> None:
        """Become the chunk of these tokens."""
        rows = len(self.tokens)
        padding = rows - len(tokens)
        spans = [*spans, Span(-1, len(tokens), rows, padding)]
        positions = [p for span in spans for p in range(span.context - span.rows, span.context)]
        self._mailbox.write(self.tokens, [*tokens, *[0] * padding])
        self._mailbox.write(self.positions, positions)
        self._mailbox.write(self.slots, [span.slot for span in spans for _ in range(span.rows)])
        self._batch.fill(spans)
        self._mailbox.send()

    def forward(self, model: CausalLM, cache: Cache) -> Tensor:
        """The hidden states of all rows, (rows, D). Depends on nothing that `fill` changes on the host."""
        return model.forward(self.tokens, self.positions, Slots(self.slots, (), self._batch), cache)


class PrefillStep:
    """Runs chunks of up to `most_rows` rows over one model and cache.

    With a pool for recordings, a number of rows is recorded when it is needed for the second time, or by `warm_up`, or
    with `always_recorded` at once: a recorded chunk goes through other kernels than one that is not.
    Only where a cache forgets is a chunk never recorded: what its rows see depends on how they write over each other.
    With `small`, chunks of a few rows are padded less, for they are what is mostly fed.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: Cache,
        most_rows: int,
        pool: Pool | None = None,
        *,
        small: bool = False,
        always_recorded: bool = False,
    ) -> None:
        self._model, self._cache, self._pool, self._small = model, cache, pool, small
        self._always_recorded = always_recorded
        self._most = min(most_rows, len(cache.lengths) * cache.places)
        self._sequences = len(cache.lengths) + 1  # and padding
        self._buckets: dict[int, tuple[PaddedChunk, Graph]] = {}
        self._seen: set[int] = set()
        if pool is not None:
            shape = (bucket_rows(self._most), model.config.hidden_size)
            self._hidden = torch.empty(shape, dtype=model.dtype, device=model.device)

    def warm_up(self) -> None:
        """Record every number of rows, the largest first: the smaller ones fit into the memory that it has taken."""
        if self._pool is not None:
            sizes = {bucket_rows(rows, small=self._small) for rows in range(1, self._most + 1)}
            for size in sorted(sizes, reverse=True):
                self._recorded(size)

    def reset(self) -> None:
        """Free what recordings take; what is needed again is recorded again. The device must be done with them."""
        for _, graph in self._buckets.values():
            graph.reset()
        self._buckets.clear()
        self._seen.clear()

    def run(self, tokens: Sequence[int], slots: Sequence[int], counts: Sequence[int]) -> Fed:
        """Feed the next `counts[i]` of the tokens to `slots[i]`, and count them as cached. Waits for nothing.

        What it returns stands until the next run.
        """
        spans, start = [], 0
        for slot, count in zip(slots, counts, strict=True):
            spans.append(Span(slot, start, start + count, self._cache.lengths[slot] + count))
            start += count
        fed = self._run(tokens, tuple(spans), start)
        for span in spans:
            self._cache.lengths[span.slot] = span.context
        return fed

    def _run(self, tokens: Sequence[int], spans: tuple[Span, ...], rows: int) -> Fed:
        if self._pool is None or any(self._cache.forgets(span.context) for span in spans):
            return self._at_once(tokens, spans)
        size = bucket_rows(rows, small=self._small)
        if not (self._always_recorded or size in self._seen or size in self._buckets):
            self._seen.add(size)
            return self._at_once(tokens, spans)
        chunk, graph = self._recorded(size)
        chunk.fill(tokens, spans)
        graph.replay()
        return Fed(self._hidden[:rows], chunk.positions[:rows], chunk.slots[:rows], spans)

    def _at_once(self, tokens: Sequence[int], spans: tuple[Span, ...]) -> Fed:
        slots, counts = [span.slot for span in spans], [span.rows for span in spans]
        offsets = [span.context - span.rows for span in spans]
        positions, places = ragged(slots, counts, offsets, self._model.device)
        ids = torch.tensor(tokens, device=self._model.device)
        hidden = self._model.forward(ids, positions, places, self._cache)
        return Fed(hidden, positions, places.index, places.spans)

    def _recorded(self, rows: int) -> tuple[PaddedChunk, Graph]:
        if rows not in self._buckets:
            chunk = PaddedChunk(rows, self._sequences, self._model.device)
            chunk.fill((), ())  # to be called once now must leave no trace
            graph = Graph(lambda: self._forward(chunk), self._model.device, pool=self._pool)
            graph.capture()
            self._buckets[rows] = chunk, graph
        return self._buckets[rows]

    def _forward(self, chunk: PaddedChunk) -> None:
        self._hidden[: len(chunk.tokens)].copy_(chunk.forward(self._model, self._cache))


def bucket_rows(rows: int, *, small: bool = False) -> int:
    """The number of rows that a chunk is padded to: at most a quarter more, in steps of 16 or more, or of 4 below."""
    step = _SMALL_STEP if small and rows < _STEP else max(_STEP, 1 << max(rows - 1, 1).bit_length() >> 3)
    return -(-rows // step) * step
