"""What a model remembers of its sequences: tensors of fixed address, one slot a sequence, written in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.kernels.attention.store import Quantized, row_bytes
from gfxlm.ops.kv import write_kv
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
        write_kv(keys, values, self.keys, self.values, positions, slots)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored, each (slots, max_context, ...)."""
        return self.keys, self.values


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
        if bits not in (4, 8) or group_size not in (32, 64, 128):
            raise UserError(f"a KV cache can have 4 or 8 bits and groups of 32, 64 or 128, not {bits} and {group_size}")
        if head_dim % group_size:
            raise UserError(f"heads of {head_dim} features cannot be quantised in groups of {group_size}")
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


LayerCache = KVCache | QuantizedKVCache | RecurrentCache


@dataclass(frozen=True, slots=True)
class Cache:
    """The caches of all layers, and how many positions each slot holds (host integers, the scheduler's books)."""

    layers: Sequence[LayerCache]
    lengths: list[int]
    max_context: int

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def copy_slot(self, slot: int, source: "Cache", source_slot: int) -> None:
        """Make `slot` continue what another cache's slot holds."""
        length = source.lengths[source_slot]
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            for ours, other in zip(mine.tensors, theirs.tensors, strict=True):
                if isinstance(mine, RecurrentCache):
                    ours[slot] = other[source_slot]
                else:
                    ours[slot, :length] = other[source_slot, :length]
        self.lengths[slot] = length

    @property
    def trimmable(self) -> bool:
        """True where positions can be forgotten from the end: a recurrent state cannot be wound back."""
        return not any(isinstance(layer, RecurrentCache) for layer in self.layers)
