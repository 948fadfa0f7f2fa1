"""The decode step: one more token for every row, from tensors of fixed address, the host one step behind.

What a row needs lies on the device by slot: its last token and how many positions it has. A step takes both from
there and leaves both there, so that the next one can be launched before anybody has read this one's tokens.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gfxlm.device.graph import Graph, Pool
from gfxlm.engine.logprobs import Draw
from gfxlm.kernels.batch import Span
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache
from gfxlm.ops.ragged import Slots


class StepSampler(Protocol):
    """What the step asks of a sampler."""

    @property
    def graph_key(self) -> Hashable | None:
        """What a recording of `sample` is valid for; None where it cannot be recorded."""

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Draw: ...


@dataclass(slots=True)
class Sampled:
    """One step's tokens on their way to the host, with what was wanted besides: a `Draw` of its real rows."""

    _draw: Draw
    _arrived: torch.cuda.Event | None

    def read(self) -> Draw:
        """Wait for the tokens and for `top`, which then are in host memory; `logprobs` stay on the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._draw


@dataclass(slots=True)
class _Bucket:
    """The fixed tensors and the recordings for steps of up to `rows` rows."""

    rows: int
    slots: Tensor  # (rows,), -1 for padding
    places: Tensor  # (rows,), the slot's row in `DecodeStep`'s books; the last one for padding
    tokens: Tensor  # (rows,)
    positions: Tensor  # (rows,)
    hidden: Tensor  # (rows, D), of rows that came from elsewhere
    logits: Tensor  # (rows, V)
    forward: Graph = field(init=False)  # of the rows' last tokens
    head: Graph = field(init=False)  # of `hidden`
    draws: dict[Hashable, Draw] = field(default_factory=dict)  # by what they were recorded for
    filled: tuple[int, ...] = ()
    sampling: dict[Hashable, Graph] = field(default_factory=dict)


class DecodeStep:
    """Runs decode steps over one model, cache and sampler; with a pool for recordings, recorded per number of rows.

    With `one_size` every recorded step has a row for each slot, so that a row's numbers do not depend on its company.
    """

    def __init__(
        self, model: CausalLM, cache: Cache, sampler: StepSampler, pool: Pool | None = None, *, one_size: bool = False
    ) -> None:
        self._model, self._cache, self._sampler, self._pool = model, cache, sampler, pool
        self._one_size = one_size
        self._slots = len(cache.lengths)
        device = model.device
        self._last = torch.zeros(self._slots + 1, dtype=torch.int64, device=device)
        self._length = torch.zeros(self._slots + 1, dtype=torch.int64, device=device)
        self._buckets: dict[int, _Bucket] = {}

    def warm_up(self) -> None:
        """Record steps for every number of rows, and sampling as it now is."""
        if self._pool is None:
            return
        self._bucket(self._slots)
        if (key := self._sampler.graph_key) is not None:
            for bucket in self._buckets.values():
                self._sampling(bucket, key)

    def reset(self) -> None:
        """Free what recordings take; what is needed again is recorded again. Not between `forward` and `sample`.

        The device must be done with them.
        """
        for bucket in self._buckets.values():
            for graph in (bucket.forward, bucket.head, *bucket.sampling.values()):
                graph.reset()
        self._buckets.clear()

    def begin(self, slots: Sequence[int], hidden: Tensor, positions: Tensor) -> Sampled:
        """Launch the sampling of the first tokens of these slots: hidden (R, D) and positions (R,) end their prompts.

        From here on `run` can go on with them. Waits for nothing.
        """
        bucket = self._bucket(len(slots))
        self._fill(bucket, tuple(slots))
        bucket.hidden[: len(slots)].copy_(hidden)
        bucket.positions[: len(slots)].copy_(positions)
        bucket.head.replay()
        return self._sampled(bucket)

    def place(self, last: Mapping[int, int]) -> None:
        """Say what the last tokens of slots are, by slot, whose steps were not run here. Waits for nothing."""
        numbers = torch.tensor([(slot, token, self._cache.lengths[slot]) for slot, token in last.items()]).mT
        if self._last.is_cuda:
            numbers = numbers.pin_memory()
        slots, tokens, lengths = numbers.to(self._last.device, non_blocking=True)
        self._last.index_copy_(0, slots, tokens)
        self._length.index_copy_(0, slots, lengths)

    def run(self, slots: Sequence[int]) -> Sampled:
        """Launch one step for these slots. Waits for nothing."""
        self.forward(slots)
        return self.sample(slots)

    def forward(self, slots: Sequence[int]) -> None:
        """Launch a step all but its sampling, which the next call here has to be. Waits for nothing."""
        bucket = self._bucket(len(slots))
        self._fill(bucket, tuple(slots))
        bucket.forward.replay()

    def sample(self, slots: Sequence[int]) -> Sampled:
        """Launch the sampling of what `forward` was given. Waits for nothing."""
        return self._sampled(self._bucket(len(slots)))

    def _sampled(self, bucket: _Bucket) -> Sampled:
        key = self._sampler.graph_key
        if key is None:
            self._sample(bucket, key, len(bucket.filled))  # nobody from outside is shown padding
        else:
            self._sampling(bucket, key).replay()
        return self._send(bucket, key)

    def _bucket(self, rows: int) -> _Bucket:
        if self._pool is None:  # where nothing is recorded, padding would only cost
            if rows not in self._buckets:
                self._add_bucket(rows)
            return self._buckets[rows]
        if not self._buckets:
            self._capture_all()
        return self._buckets[min(size for size in self._buckets if size >= rows)]

    def _capture_all(self) -> None:
        """Largest first: the smaller ones then fit into the memory that it has taken."""
        smaller = () if self._one_size else (1 << i for i in range((self._slots - 1).bit_length()))
        sizes = {self._slots, *smaller}
        for size in sorted(sizes, reverse=True):
            bucket = self._add_bucket(size)
            bucket.forward.capture()
            bucket.head.capture()

    def _add_bucket(self, rows: int) -> _Bucket:
        device = self._model.device

        def integers(value: int) -> Tensor:
            return torch.full((rows,), value, dtype=torch.int64, device=device)

        config, dtype = self._model.config, self._model.dtype
        hidden = torch.zeros(rows, config.hidden_size, dtype=dtype, device=device)
        logits = torch.empty(rows, config.vocab_size, dtype=dtype, device=device)
        bucket = _Bucket(rows, integers(-1), integers(self._slots), integers(0), integers(0), hidden, logits)
        bucket.forward = Graph(lambda: self._forward(bucket), device, pool=self._pool)
        bucket.head = Graph(lambda: self._head(bucket, bucket.hidden), device, pool=self._pool)
        self._buckets[rows] = bucket
        return bucket

    def _fill(self, bucket: _Bucket, slots: tuple[int, ...]) -> None:
        if bucket.filled == slots:
            return
        padding = bucket.rows - len(slots)
        both = torch.tensor([[*slots, *[-1] * padding], [*slots, *[self._slots] * padding]])
        if bucket.slots.is_cuda:
            both = both.pin_memory()
        bucket.slots.copy_(both[0], non_blocking=True)
        bucket.places.copy_(both[1], non_blocking=True)
        bucket.filled = slots

    def _forward(self, bucket: _Bucket) -> None:
        bucket.tokens.copy_(self._last[bucket.places])
        bucket.positions.copy_(self._length[bucket.places])
        hidden = self._model.forward(
            bucket.tokens, bucket.positions, Slots(bucket.slots, self._spans(bucket)), self._cache
        )
        self._head(bucket, hidden)

    def _head(self, bucket: _Bucket, hidden: Tensor) -> None:
        bucket.logits.copy_(self._model.logits(hidden))

    def _spans(self, bucket: _Bucket) -> tuple[Span, ...]:
        """One row a sequence. A recording is made with nothing but padding, and serves for every length."""
        real = [(slot, self._cache.lengths[slot] + 1) for slot in bucket.filled]
        padding = [(0, self._cache.max_context)] * (bucket.rows - len(real))
        return tuple(Span(slot, row, row + 1, context) for row, (slot, context) in enumerate([*real, *padding]))

    def _sampling(self, bucket: _Bucket, key: Hashable) -> Graph:
        if key not in bucket.sampling:
            graph = Graph(lambda: self._sample(bucket, key, bucket.rows), self._model.device, pool=self._pool)
            if self._pool is not None:
                filled = bucket.filled
                self._fill(bucket, ())  # to be called once now must leave no trace
                graph.capture()
                self._fill(bucket, filled)
            bucket.sampling[key] = graph
        return bucket.sampling[key]

    def _sample(self, bucket: _Bucket, key: Hashable, rows: int) -> None:
        """Choose tokens, and leave them where the next step finds them."""
        places, positions = bucket.places[:rows], bucket.positions[:rows]
        draw = self._sampler.sample(bucket.logits[:rows], places, positions)
        bucket.draws[key] = draw
        # A row whose logits were not finite is over; its successor must only be a token that exists.
        self._last.index_copy_(0, places, draw.tokens.clamp(min=0))
        self._length.index_copy_(0, places, positions + 1)

    @staticmethod
    def _send(bucket: _Bucket, key: Hashable) -> Sampled:
        rows, draw = len(bucket.filled), bucket.draws[key]
        logprobs = None if draw.logprobs is None else draw.logprobs[:rows].clone()
        top = None if draw.top is None else _sent(draw.top[:rows])
        sent = Draw(_sent(draw.tokens[:rows]), logprobs, top)
        if not draw.tokens.is_cuda:
            return Sampled(sent, None)
        arrived = torch.cuda.Event()
        arrived.record()
        return Sampled(sent, arrived)


def _sent(tensor: Tensor) -> Tensor:
    """A copy on the host, on its way there from a GPU."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
