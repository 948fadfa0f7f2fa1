"""Keys or values of a cache as kernels see them: a tensor, or codes."""

from dataclasses import dataclass

import torch
from torch import Tensor


def row_bytes(size: int, bits: int) -> int:
    """Bytes of the codes of one head: halves are powers of two, so that kernels can cut them."""
    return size if bits == 8 else max(16, 1 << (size - 1).bit_length()) // 2


@dataclass(frozen=True, slots=True)
class Quantized:
    """Keys, or values, (slots, context, heads, D) in affine codes of 4 or 8 bits, both tensors contiguous.

    The codes are MLX's, but of 4 bits the first half of a row lies in the lower halves of its bytes and the second in
    the upper ones: no kernel has to interleave them. `codes` is uint8 (slots, context, heads, `row_bytes`), `scales`
    (slots, context, heads, D / group_size, 2) has each group's scale and then its bias.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(slots, context, heads, D)."""
        return (*self.codes.shape[:3], self.scales.shape[3] * self.group_size)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers that the codes stand for."""
        return self.scales.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


Store = Tensor | Quantized


def facts(store: Store) -> tuple[Tensor, Tensor, int, int]:
    """What a kernel is given: numbers or codes, int32 pairs of half-precision scale and bias, bits (16: none), group.

    Float scales are given as they are. The numbers stand for the pairs where there are none.
    """
    if isinstance(store, Tensor):
        return store, store, 16, 1
    pairs = store.scales if store.dtype == torch.float32 else store.scales.view(torch.int32)
    return store.codes, pairs, store.bits, store.group_size


def strides(store: Store) -> tuple[int, ...]:
    """Of slot, key and head: in numbers, or in heads of codes, which count codes and scales alike."""
    if isinstance(store, Tensor):
        return store.stride()[:3]
    return tuple(stride // store.codes.shape[3] for stride in store.codes.stride()[:3])
