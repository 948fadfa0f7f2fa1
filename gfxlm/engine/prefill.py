"""Feeding prompts: chunks of rows of several sequences, recorded per number of rows where the device can do that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gfxlm.device.graph import Graph
from gfxlm.device.mailbox import Mailbox
from gfxlm.kernels.batch import RefilledBatch, Span
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache
from gfxlm.ops.ragged import Slots, ragged

# Kernels are compiled apart for numbers of rows that are multiples of this and for others.
_STEP = 16


@dataclass(frozen=True, slots=True)
class Fed:
    """Rows that the model has been given: normed hidden states (N, D), and each row's position and slot, (N,)."""

    hidden: Tensor
    positions: Tensor
    slots: Tensor
    spans: tuple[Span, ...]

    def at(self, rows: Sequence[int]) -> "tuple[Tensor, Tensor, Tensor]":
        """Hidden states, positions and slots of some rows."""
        if len(rows) == 1:  # a view: nothing to launch
            row = slice(rows[0], rows[0] + 1)
            return self.hidden[row], self.positions[row], self.slots[row]
        index = torch.tensor(rows, device=self.hidden.device)
        return self.hidden[index], self.positions[index], self.slots[index]


@dataclass(frozen=True, slots=True)
class _Bucket:
    """The fixed tensors and the recording for chunks of up to so many rows."""

    mailbox: Mailbox
    tokens: Tensor  # (rows,)
    positions: Tensor  # (rows,)
    slots: Tensor  # (rows,), -1 for padding
    batch: RefilledBatch
    graph: Graph


class PrefillStep:
    """Runs chunks of up to `most_rows` rows over one model and cache.

    With a pool for recordings, a number of rows is recorded when it is needed for the second time, or by `warm_up`.
    """

    def __init__(self, model: CausalLM, cache: Cache, most_rows: int, pool: Any = None) -> None:
        self._model, self._cache, self._pool = model, cache, pool
        self._most = min(most_rows, len(cache.lengths) * cache.max_context)
        self._sequences = len(cache.lengths) + 1  # and padding
        self._buckets: dict[int, _Bucket] = {}
        self._seen: set[int] = set()
        if pool is not None:
            shape = (bucket_rows(self._most), model.config.hidden_size)
            self._hidden = torch.empty(shape, dtype=model.dtype, device=model.device)

    def warm_up(self) -> None:
        """Record every number of rows, the largest first: the smaller ones fit into the memory that it has taken."""
        if self._pool is not None:
            sizes = {bucket_rows(rows) for rows in range(1, self._most + 1)}
            for size in sorted(sizes, reverse=True):
                self._recorded(size)

    def run(self, tokens: Sequence[int], slots: Sequence[int], counts: Sequence[int]) -> Fed:
        """Feed the next `counts[i]` of the tokens to `slots[i]`, and count them as cached. Waits for nothing.

        What it returns stands until the next run.
        """
        lengths = self._cache.lengths
        spans, start = [], 0
        for slot, count in zip(slots, counts, strict=True):
            spans.append(Span(slot, start, start + count, lengths[slot] + count))
            lengths[slot] += count
            start += count
        size = bucket_rows(start)
        if self._pool is None or not (size in self._seen or size in self._buckets):
            self._seen.add(size)
            return self._at_once(tokens, tuple(spans))
        bucket = self._recorded(size)
        self._fill(bucket, tokens, spans)
        bucket.graph.replay()
        return Fed(self._hidden[:start], bucket.positions[:start], bucket.slots[:start], tuple(spans))

    def _at_once(self, tokens: Sequence[int], spans: tuple[Span, ...]) -> Fed:
        slots, counts = [span.slot for span in spans], [span.rows for span in spans]
        offsets = [span.context - span.rows for span in spans]
        positions, places = ragged(slots, counts, offsets, self._model.device)
        ids = torch.tensor(tokens, device=self._model.device)
        hidden = self._model.forward(ids, positions, places, self._cache)
        return Fed(hidden, positions, places.index, places.spans)

    def _recorded(self, rows: int) -> _Bucket:
        if rows not in self._buckets:
            self._buckets[rows] = self._add_bucket(rows)
        return self._buckets[rows]

    def _add_bucket(self, rows: int) -> _Bucket:
        # Three numbers of 64 bits a row, and tables: the longest has five of 32 bits a row and sequence.
        mailbox = Mailbox(16 * (rows + self._sequences), self._model.device)
        tokens, positions, slots = (mailbox.tensor((rows,), torch.int64) for _ in range(3))
        batch = RefilledBatch(rows, self._sequences, mailbox)

        def forward() -> None:
            hidden = self._model.forward(tokens, positions, Slots(slots, (), batch), self._cache)
            self._hidden[:rows].copy_(hidden)

        graph = Graph(forward, self._model.device, pool=self._pool)
        bucket = _Bucket(mailbox, tokens, positions, slots, batch, graph)
        self._fill(bucket, (), ())  # to be called once now must leave no trace
        graph.capture()
        return bucket

    @staticmethod
    def _fill(bucket: _Bucket, tokens: Sequence[int], spans: Sequence[Span]) -> None:
        padding = len(bucket.tokens) - len(tokens)
        spans = [*spans, Span(-1, len(tokens), len(bucket.tokens), padding)]
        positions = [p for span in spans for p in range(span.context - span.rows, span.context)]
        bucket.mailbox.write(bucket.tokens, [*tokens, *[0] * padding])
        bucket.mailbox.write(bucket.positions, positions)
        bucket.mailbox.write(bucket.slots, [span.slot for span in spans for _ in range(span.rows)])
        bucket.batch.fill(spans)
        bucket.mailbox.send()


def bucket_rows(rows: int) -> int:
    """The number of rows that a chunk is padded to: at most a quarter more, in steps of 16 or more."""
    step = max(_STEP, 1 << max(rows - 1, 1).bit_length() >> 3)
    return -(-rows // step) * step
