"""What a model remembers of its sequences: tensors of fixed address, one slot a sequence, written in place."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.kernels.attention.store import Quantized, row_bytes
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


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of one attention layer, (slots, max_context, kv_heads, head_dim) each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls,
        slots: int,
        max_context: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KVCache":
        """Room for `max_context` positions in each slot."""
        shape = (slots, max_context, kv_heads, head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    def write(self, keys: Tensor, values: Tensor, positions: Tensor, slots: Slots) -> None:
        """Store the rows of a flattened batch, (N, kv_heads, head_dim), at their slots and positions."""
        write_kv(keys, values, self.keys, self.values, positions, slots)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored, each (slots, max_context, ...)."""
        return self.keys, self.values

    def to(self, device: torch.device) -> "KVCache":
        """The same on another device."""
        return KVCache(self.keys.to(device), self.values.to(device))


@dataclass(frozen=True, slots=True)
class QuantizedKVCache:
    """Keys and values of one attention layer in affine codes of 4 or 8 bits, with a scale and a bias a group."""

    keys: Quantized
    values: Quantized

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
    ) -> "QuantizedKVCache":
        """Room for `max_context` positions in each slot. UserError if heads cannot be cut into groups of that size."""
        KVFormat(bits, group_size).check(head_dim)
        shape = (slots, max_context, kv_heads)

        def store() -> Quantized:
            codes = torch.empty(*shape, row_bytes(head_dim, bits), dtype=torch.uint8, device=device)
            scales = torch.empty(*shape, head_dim // group_size, 2, dtype=dtype, device=device)
            return Quantized(codes, scales, bits, group_size)

        return cls(store(), store())

    def write(self, keys: Tensor, values: Tensor, positions: Tensor, slots: Slots) -> None:
        """Quantise and store the rows of a flattened batch, (N, kv_heads, head_dim)."""
        write_kv(keys, values, self.keys, self.values, positions, slots)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored, each (slots, max_context, ...)."""
        return self.keys.codes, self.keys.scales, self.values.codes, self.values.scales

    @property
    def format(self) -> KVFormat:
        """How it is quantised."""
        return KVFormat(self.keys.bits, self.keys.group_size)

    def to(self, device: torch.device) -> "QuantizedKVCache":
        """The same on another device."""

        def moved(store: Quantized) -> Quantized:
            return replace(store, codes=store.codes.to(device), scales=store.scales.to(device))

        return QuantizedKVCache(moved(self.keys), moved(self.values))


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

    `identity` tells the model that it belongs to.
    """

    layers: list[LayerCache]
    lengths: list[int]
    max_context: int
    identity: Callable[[], Identity] | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def copy_slot(self, slot: int, source: "Cache", source_slot: int) -> None:
        """Make `slot` continue what another cache's slot holds, quantised as this cache is."""
        length = source.lengths[source_slot]
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            if kv_format(mine) != kv_format(theirs):
                _copy_rows(mine, slot, theirs, source_slot, length)
                continue
            for ours, other in zip(mine.tensors, theirs.tensors, strict=True):
                if isinstance(mine, RecurrentCache):
                    ours[slot] = other[source_slot]
                else:
                    ours[slot, :length] = other[source_slot, :length]
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
        slots, max_context, heads, size = layer.keys.shape
        wanted = QuantizedKVCache.allocate(
            slots,
            max_context,
            heads,
            size,
            layer.keys.dtype,
            layer.keys.device,
            bits=format.bits,
            group_size=format.group_size,
        )
        for slot, length in enumerate(self.lengths):
            _copy_rows(wanted, slot, layer, slot, length)
        return wanted

    def move(self, device: torch.device) -> None:
        """Bring everything to a device."""
        self.layers[:] = [layer.to(device) for layer in self.layers]

    @property
    def trimmable(self) -> bool:
        """True where positions can be forgotten from the end: a recurrent state cannot be wound back."""
        return not any(isinstance(layer, RecurrentCache) for layer in self.layers)


def kv_format(layer: LayerCache) -> KVFormat | None:
    """How a layer's keys and values are quantised, None where they are not."""
    return layer.format if isinstance(layer, QuantizedKVCache) else None


def _copy_rows(mine: LayerCache, slot: int, theirs: LayerCache, source_slot: int, length: int) -> None:
    """Copy keys and values between two formats: as numbers."""
    assert not isinstance(mine, RecurrentCache)
    assert not isinstance(theirs, RecurrentCache)
    if length == 0:
        return
    device = mine.tensors[0].device
    positions, slots = ragged([slot], [length], [0], device)
    keys, values = (read(store, source_slot, 0, length).to(device) for store in (theirs.keys, theirs.values))
    mine.write(keys, values, positions, slots)
