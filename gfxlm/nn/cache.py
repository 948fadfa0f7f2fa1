"""What a model remembers of its sequences: tensors of fixed address, one slot a sequence, written in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.ops.ragged import Slots


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
        self.keys.index_put_((slots.index, positions), keys)
        self.values.index_put_((slots.index, positions), values)


@dataclass(frozen=True, slots=True)
class RecurrentCache:
    """One gated delta net layer: the last inputs of its convolution, and its fp32 state.

    `conv` is (slots, kernel - 1, channels), `state` is (slots, value_heads, value_dim, key_dim).
    """

    conv: Tensor
    state: Tensor


LayerCache = KVCache | RecurrentCache


@dataclass(frozen=True, slots=True)
class Cache:
    """The caches of all layers, and how many positions each slot holds (host integers, the scheduler's books)."""

    layers: Sequence[LayerCache]
    lengths: list[int]
    max_context: int

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors."""
        return sum(
            tensor.nbytes
            for layer in self.layers
            for tensor in ((layer.keys, layer.values) if isinstance(layer, KVCache) else (layer.conv, layer.state))
        )

    def copy_slot(self, slot: int, source: "Cache", source_slot: int) -> None:
        """Make `slot` continue what another cache's slot holds."""
        length = source.lengths[source_slot]
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            if isinstance(mine, KVCache) and isinstance(theirs, KVCache):
                mine.keys[slot, :length] = theirs.keys[source_slot, :length]
                mine.values[slot, :length] = theirs.values[source_slot, :length]
            elif isinstance(mine, RecurrentCache) and isinstance(theirs, RecurrentCache):
                mine.conv[slot] = theirs.conv[source_slot]
                mine.state[slot] = theirs.state[source_slot]
        self.lengths[slot] = length

    @property
    def trimmable(self) -> bool:
        """True where positions can be forgotten from the end: a recurrent state cannot be wound back."""
        return all(isinstance(layer, KVCache) for layer in self.layers)
