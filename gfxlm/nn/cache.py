"""What a model remembers of its sequences: tensors of fixed address, one slot a sequence, written in place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.kernels.attention.store import Quantized, row_bytes
from gfxlm.nn.pages import Pages
from gfxlm.nn.ring import Ring, rearranged
from gfxlm.ops.kv import read, write_kv
from gfxlm.ops.ragged import Slots, ragged

_BITS, _GROUP_SIZES = (4, 8), (32, 64, 128)


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values are quantised. Raises UserError for bits or groups that there are not."""

    bits: int = 8
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in _BITS or self.group_size not in _GROUP_SIZES:
            raise UserError(
                f"a KV cache can have 4 or 8 bits and groups of 32, 64 or 128, not {self.bits} and {self.group_size}"
            )

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"

    def check(self, head_dim: int) -> None:
        """Raise UserError, saying what would fit, unless heads of `head_dim` features divide into such groups."""
        if head_dim % self.group_size == 0:
            return
        fitting = [str(size) for size in _GROUP_SIZES if head_dim % size == 0]
        instead = f"groups of {' or '.join(fitting)} fit" if fitting else "no size of groups fits"
        raise UserError(f"heads of {head_dim} features cannot be quantised in groups of {self.group_size}; {instead}")


S = TypeVar("S", Tensor, Quantized)


@dataclass(frozen=True, slots=True)
class _Stores(Generic[S]):
    """One layer's keys and values, however they are stored, and the book that says whose the pages are."""

    keys: S
    values: S
    pages: Pages | None = None

    @property
    def table(self) -> Tensor | None:
        """The page table that goes with keys and values, int32 (slots, n)."""
        return None if self.pages is None else self.pages.table

    def write(self, keys: Tensor, values: Tensor, positions: Tensor, slots: Slots) -> None:
        """Store the rows of a flattened batch, (N, kv_heads, head_dim), at their slots and positions."""
        write_kv(keys, values, self.keys, self.values, positions, slots, pages=self.table)


@dataclass(frozen=True, slots=True)
class KVCache(_Stores[Tensor]):
    """Keys and values of one attention layer, (slots, max_context, kv_heads, head_dim) each.

    With `pages` they are (pages, page size, ...), and the book says which page is whose.
    """

    @classmethod
    def allocate(
        cls,
        slots: int,
        max_context: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        pages: Pages | None = None,
    ) -> "KVCache":
        """Room for `max_context` positions in each slot, or for so many as the pages hold."""
        places = (slots, max_context) if pages is None else (pages.count, pages.size)
        keys, values = (torch.empty(*places, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values, pages)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored, each (slots, max_context, ...) or (pages, page size, ...)."""
        return self.keys, self.values

    def alike(self, places: int) -> "KVCache":
        """An empty one of one slot and so many places."""
        keys, values = (tensor.new_empty(1, places, *tensor.shape[2:]) for tensor in self.tensors)
        return KVCache(keys, values)

    def to(self, device: torch.device) -> "KVCache":
        """The same on another device, with the same book of pages."""
        return KVCache(self.keys.to(device), self.values.to(device), self.pages)


@dataclass(frozen=True, slots=True)
class QuantizedKVCache(_Stores[Quantized]):
    """Keys and values of one attention layer in affine codes of 4 or 8 bits, with a scale and a bias a group."""

    @classmethod
    def allocate(
        cls,
        slots: int,
        max_context: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        bits: int = 8,
        group_size: int = 64,
        pages: Pages | None = None,
    ) -> "QuantizedKVCache":
        """Room as in `KVCache.allocate`. UserError if heads cannot be cut into groups of that size."""
        KVFormat(bits, group_size).check(head_dim)
        shape = (*((slots, max_context) if pages is None else (pages.count, pages.size)), kv_heads)

        def store() -> Quantized:
            codes = torch.empty(*shape, row_bytes(head_dim, bits), dtype=torch.uint8, device=device)
            scales = torch.empty(*shape, head_dim // group_size, 2, dtype=dtype, device=device)
            return Quantized(codes, scales, bits, group_size)

        return cls(store(), store(), pages)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored, each (slots, max_context, ...) or (pages, page size, ...)."""
        return self.keys.codes, self.keys.scales, self.values.codes, self.values.scales

    @property
    def format(self) -> KVFormat:
        """How it is quantised."""
        return KVFormat(self.keys.bits, self.keys.group_size)

    def alike(self, places: int) -> "QuantizedKVCache":
        """An empty one of one slot and so many places."""

        def empty(store: Quantized) -> Quantized:
            codes, scales = (x.new_empty(1, places, *x.shape[2:]) for x in (store.codes, store.scales))
            return replace(store, codes=codes, scales=scales)

        return QuantizedKVCache(empty(self.keys), empty(self.values))

    def to(self, device: torch.device) -> "QuantizedKVCache":
        """The same on another device, with the same book of pages."""

        def moved(store: Quantized) -> Quantized:
            return replace(store, codes=store.codes.to(device), scales=store.scales.to(device))

        return QuantizedKVCache(moved(self.keys), moved(self.values), self.pages)


@dataclass(frozen=True, slots=True)
class RecurrentCache:
    """One gated delta net layer: the last inputs of its convolution, and its fp32 state.

    `conv` is (slots, kernel, channels), a ring: the input of position p lies at p % kernel. `state` is (slots,
    value_heads, value_dim, key_dim).
    """

    conv: Tensor
    state: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored, each (slots, ...)."""
        return self.conv, self.state

    def to(self, device: torch.device) -> "RecurrentCache":
        """The same on another device."""
        return RecurrentCache(self.conv.to(device), self.state.to(device))


LayerCache = KVCache | QuantizedKVCache | RecurrentCache


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one model from another: its config as JSON, and a few numbers of its matrices, fp32 (matrices, n)."""

    config: str
    sample: Tensor

    def matches(self, other: "Identity") -> bool:
        """Whether both are of one model, be it in other layouts, whose numbers differ in their last bits."""
        if self.config != other.config or self.sample.shape != other.sample.shape:
            return False
        tolerance = self.sample.abs().amax(-1, keepdim=True) * 2**-7
        return bool(((self.sample - other.sample).abs() <= tolerance).all())


@dataclass(frozen=True, slots=True)
class Cache:
    """The caches of all layers, and how many positions each slot holds (host integers, the scheduler's books).

    `identity` tells the model that it belongs to. Where there are `pages`, a slot has room for what was reserved. With
    a `ring`, keys and values have only its places, and a text of up to `max_context` positions goes round in them.
    """

    layers: list[LayerCache]
    lengths: list[int]
    max_context: int
    identity: Callable[[], Identity] | None = field(default=None, repr=False, compare=False)
    pages: Pages | None = field(default=None, repr=False, compare=False)
    ring: Ring | None = None

    @property
    def places(self) -> int:
        """How many positions' keys and values a slot can hold at a time."""
        return self.max_context if self.ring is None else self.ring.size

    @property
    def positions(self) -> int:
        """Of how many positions all slots together can have keys and values."""
        return len(self.lengths) * self.places if self.pages is None else (self.pages.count - 1) * self.pages.size

    def forgets(self, positions: int) -> bool:
        """Whether a text of so many positions has written over its older ones."""
        return positions > self.places

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors."""
        table = 0 if self.pages is None else self.pages.table.nbytes
        return table + sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def promise(self, slot: int, positions: int, shared: Sequence[int] = ()) -> bool:
        """Let a slot have room for so many positions in all when it needs it, the first of them in `shared` pages.

        False, and nothing is changed, where there is none.
        """
        if positions > self.max_context:
            return False
        return self.pages is None or self.pages.promise(slot, min(positions, self.places), shared)

    def reserve(self, slot: int, positions: int) -> bool:
        """Make room for so many positions in all; False, and nothing is changed, where there is none."""
        if positions > self.max_context:
            return False
        return self.pages is None or self.pages.reserve(slot, min(positions, self.places))

    def release(self, slot: int) -> None:
        """Empty a slot, and let others have its pages."""
        self.lengths[slot] = 0
        if self.pages is not None:
            self.pages.release(slot)

    def stored(self, tensor: Tensor, slot: int) -> Tensor:
        """What a slot holds in one of the tensors of keys and values, (n, ...): positions, or the places of a ring."""
        views = self._views(tensor, slot, self.held(self.lengths[slot]))
        return views[0] if len(views) == 1 else torch.cat(views) if views else tensor[:1, :0].flatten(0, 1)

    def held(self, length: int) -> int:
        """Of how many positions a text of `length` has keys and values here."""
        return min(length, self.places)

    def order_of(self, source: "Cache", slot: int) -> Tensor | None:
        """The places of another cache's slot in the order of this one's, None if it is the same; see `rearranged`."""
        return rearranged(source.lengths[slot], source.ring, self.ring, source.layers[0].tensors[0].device)

    def copy_slot(self, slot: int, source: "Cache", source_slot: int) -> None:
        """Make `slot` continue what another cache's slot holds, quantised as this cache is.

        Raises UserError where there is no room for it, or where the other one has forgotten what belongs here.
        """
        length = source.lengths[source_slot]
        order = self.order_of(source, source_slot)
        if not self.reserve(slot, length):
            raise UserError(f"there is no room for the {length} positions of another cache")
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            if kv_format(mine) != kv_format(theirs):
                _copy_rows(mine, slot, theirs, source_slot, source.held(length), order)
                continue
            for ours, other in zip(mine.tensors, theirs.tensors, strict=True):
                if isinstance(mine, RecurrentCache):
                    ours[slot] = other[source_slot]
                else:
                    rows = source.stored(other, source_slot)
                    self._put(ours, slot, rows if order is None else rows[order])
        self.lengths[slot] = length

    def quantize(self, format: KVFormat) -> None:
        """Quantise all keys and values that are not. UserError if one of them is, but in another format."""
        for layer in self.layers:
            if (found := kv_format(layer)) not in (None, format):
                raise UserError(f"the KV cache has {found}, not {format}")
            if isinstance(layer, KVCache):
                format.check(layer.keys.shape[-1])
        # One layer after the other: of two stores there is never more than one layer's at a time.
        for number, layer in enumerate(self.layers):
            if isinstance(layer, KVCache):
                self.layers[number] = self._quantized(layer, format)

    def _quantized(self, layer: KVCache, format: KVFormat) -> QuantizedKVCache:
        places, context, heads, size = layer.keys.shape
        wanted = QuantizedKVCache.allocate(
            places,
            context,
            heads,
            size,
            layer.keys.dtype,
            layer.keys.device,
            bits=format.bits,
            group_size=format.group_size,
            pages=layer.pages,
        )
        for slot, length in enumerate(self.lengths):
            _copy_rows(wanted, slot, layer, slot, self.held(length))
        return wanted

    def move(self, device: torch.device) -> None:
        """Bring everything to a device."""
        if self.pages is not None:
            self.pages.move(device)
        self.layers[:] = [layer.to(device) for layer in self.layers]

    @property
    def trimmable(self) -> bool:
        """True where positions can be taken back from the end.

        A recurrent state cannot be wound back, and a full ring has not what was there before.
        """
        full = self.ring is not None and max(self.lengths) >= self.ring.size
        return not full and not any(isinstance(layer, RecurrentCache) for layer in self.layers)

    def _views(self, tensor: Tensor, slot: int, length: int) -> list[Tensor]:
        return [tensor[slot, :length]] if self.pages is None else self.pages.views(tensor, slot, length)

    def _put(self, tensor: Tensor, slot: int, rows: Tensor) -> None:
        views = self._views(tensor, slot, len(rows))
        for view, part in zip(views, rows.split([len(view) for view in views]), strict=True):
            view.copy_(part)


def kv_format(layer: LayerCache) -> KVFormat | None:
    """How a layer's keys and values are quantised, None where they are not."""
    return layer.format if isinstance(layer, QuantizedKVCache) else None


def _copy_rows(
    mine: LayerCache, slot: int, theirs: LayerCache, source_slot: int, held: int, order: Tensor | None = None
) -> None:
    """Copy what lies at the first `held` places between two formats, as numbers, and in another order if need be."""
    assert not isinstance(mine, RecurrentCache)
    assert not isinstance(theirs, RecurrentCache)
    if held == 0:
        return
    device = mine.tensors[0].device
    stores = (read(store, source_slot, 0, held, theirs.table) for store in (theirs.keys, theirs.values))
    keys, values = ((rows if order is None else rows[order]).to(device) for rows in stores)
    places, slots = ragged([slot], [len(keys)], [0], device)
    mine.write(keys, values, places, slots)
