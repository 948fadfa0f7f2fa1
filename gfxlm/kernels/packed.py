"""A quantised matrix, or a stack of them, as kernels see it."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """MLX's codes and their scales for a matrix (N, K) or a stack (E, N, K).

    `words` is int32 (..., N, K * bits / 32); scales and biases are (..., N, K / group_size), of one floating type for
    mode "affine"; otherwise scales are uint8 and biases None.
    """

    words: Tensor
    scales: Tensor
    biases: Tensor | None
    group_size: int
    bits: int
    mode: str

    @classmethod
    def of(
        cls, w: Tensor, scales: Tensor, biases: Tensor | None, group_size: int, bits: int, mode: str = "affine"
    ) -> "Packed":
        """From MLX's own uint32 weight."""
        return cls(w.view(torch.int32), scales, biases, group_size, bits, mode)

    def at(self, index: slice | Tensor) -> "Packed":
        """Some rows of a matrix, or matrices of a stack."""
        biases = None if self.biases is None else self.biases[index]
        return replace(self, words=self.words[index], scales=self.scales[index], biases=biases)

    @cached_property
    def rows(self) -> int:
        """N."""
        return self.words.shape[-2]

    @cached_property
    def columns(self) -> int:
        """K."""
        return self.words.shape[-1] * 32 // self.bits

    @cached_property
    def whole_units(self) -> bool:
        """Whether rows are whole units of 32 codes, and units lie where the widest loads may read them."""
        widest = min(4, self.bits & -self.bits)  # words
        return self.columns % 32 == 0 and self.words.storage_offset() % widest == 0

    @cached_property
    def pairs(self) -> Tensor | None:
        """int32 (..., N, K / group_size): a half-precision scale (low half) and its bias in one word.

        None where they do not lie side by side, as `PackedWeight` lays them out on a GPU.
        """
        scales, biases = self.scales, self.biases
        groups = scales.shape[-1]
        if biases is None or scales.element_size() != 2 or biases.storage_offset() != scales.storage_offset() + 1:
            return None
        stride = tuple(scales.stride())
        if stride != biases.stride() or stride[-2:] != (2 * groups, 2) or scales.storage_offset() % 2:
            return None
        if scales.untyped_storage().data_ptr() != biases.untyped_storage().data_ptr():
            return None
        flat = scales.as_strided((*scales.shape[:-1], 2 * groups), (*stride[:-1], 1))
        return flat.view(torch.int32)
