"""The one resident copy of a matrix, in whatever layout its device likes, behind one small interface."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.kernels.packed import Packed
from gfxlm.ops._common import on_gpu
from gfxlm.ops.activation import swiglu
from gfxlm.ops.formats import Quantization, pack_codes, unpack_codes
from gfxlm.ops.int4_cpu import Int4Weight, int4_applies, int4_codes, int4_matmul, int4_pack, int4_rows, int4_stacked
from gfxlm.ops.matrix import dense_matmul
from gfxlm.ops.packed import KERNEL_TYPES, packed_matmul, packed_rows, packed_swiglu
from gfxlm.ops.quantized import dequantize, quantized_matmul

MlxTriple = tuple[Tensor, Tensor, Tensor | None]


class Weight(ABC):
    """A matrix (N, K), or a stack of them (E, N, K), that can be multiplied with."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The logical shape, whatever the layout."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in memory."""

    def matmul(self, x: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """`x @ w.T + bias + residual`: (..., K) to (..., N), in x's dtype, with bias (N,). Not for a stack."""
        y = self._product(x)
        y = y if bias is None else y + bias
        return y if residual is None else residual + y

    def swiglu(self, x: Tensor) -> Tensor:
        """`silu(gate) * up`, (..., N / 2), where the first N / 2 rows give gate and the rest up. Not for a stack."""
        gate, up = self.matmul(x).chunk(2, dim=-1)
        return swiglu(gate, up)

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """`x @ w.T`."""

    @abstractmethod
    def matrix(self, index: int) -> "Weight":
        """One matrix of a stack, without a copy."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Tensor:
        """Rows by index, (*indices.shape, K). Not for a stack."""


class DenseWeight(Weight):
    """An unquantised matrix."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def _product(self, x: Tensor) -> Tensor:
        return dense_matmul(x, self.tensor)

    def matrix(self, index: int) -> "DenseWeight":
        return DenseWeight(self.tensor[index])

    def rows(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.tensor)


class PackedWeight(Weight):
    """A quantised matrix. On a CPU with a fast int4 kernel it lives in that kernel's layout, else as MLX stores it."""

    def __init__(self, layout: MlxTriple | Int4Weight, quantization: Quantization, dtype: torch.dtype) -> None:
        self._layout = layout
        self.quantization = quantization
        self.dtype = dtype

    @classmethod
    def from_mlx(
        cls, w: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization, dtype: torch.dtype
    ) -> "PackedWeight":
        """Take over MLX's (weight, scales, biases) and lay them out for their device.

        `dtype` is the type the weight is computed in; affine scales and biases are cast to it.
        """
        q = quantization
        if q.affine:
            assert biases is not None
            scales, biases = scales.to(dtype), biases.to(dtype)
            if w.device.type == "cpu" and int4_applies(q.group_size, dtype):
                return cls(_int4(w, scales, biases, q), q, dtype)
            if w.device.type != "cpu" and scales.stride(-1) != 2:
                # Side by side, a scale and its bias are one load.
                scales, biases = torch.stack((scales, biases), dim=-1).unbind(-1)
        return cls((w, scales, biases), q, dtype)

    def to_mlx(self) -> MlxTriple:
        """This weight as MLX's (weight, scales, biases); biases is None for the float modes."""
        if not isinstance(self._layout, Int4Weight):
            return self._layout
        codes, scales, biases = int4_codes(self._layout)
        return pack_codes(codes, self.quantization.bits), scales, biases

    @functools.cached_property
    def packed(self) -> Packed:
        """This weight as kernels take it. Not where it lives in a CPU kernel's layout."""
        assert not isinstance(self._layout, Int4Weight)
        q = self.quantization
        return Packed.of(*self._layout, q.group_size, q.bits, q.mode)

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self._layout, Int4Weight):
            return self._layout.shape
        w, scales, _ = self._layout
        return (*w.shape[:-1], scales.shape[-1] * self.quantization.group_size)

    @property
    def nbytes(self) -> int:
        if isinstance(self._layout, Int4Weight):
            return self._layout.nbytes
        return sum(t.nbytes for t in self._layout if t is not None)

    def matmul(self, x: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        if on_gpu(x) and x.dtype in KERNEL_TYPES:
            return packed_matmul(x, self.packed, bias=bias, residual=residual)
        return super().matmul(x, bias=bias, residual=residual)

    def swiglu(self, x: Tensor) -> Tensor:
        if on_gpu(x) and x.dtype in KERNEL_TYPES:
            return packed_swiglu(x, self.packed)
        return super().swiglu(x)

    def _product(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # what a kernel makes of no rows is its own affair
            return x.new_empty(*x.shape[:-1], self.shape[-2])
        if isinstance(self._layout, Int4Weight):
            return int4_matmul(x, self._layout)
        q = self.quantization
        return quantized_matmul(x, *self._layout, group_size=q.group_size, bits=q.bits, mode=q.mode)

    def matrix(self, index: int) -> "PackedWeight":
        if isinstance(self._layout, Int4Weight):
            return PackedWeight(self._layout.matrix(index), self.quantization, self.dtype)
        w, scales, biases = self._layout
        views = (w[index], scales[index], None if biases is None else biases[index])
        return PackedWeight(views, self.quantization, self.dtype)

    def rows(self, indices: Tensor) -> Tensor:
        columns = self.shape[-1]
        if indices.numel() == 0:
            return torch.empty(*indices.shape, columns, dtype=self.dtype, device=indices.device)
        if isinstance(self._layout, Int4Weight):
            return int4_rows(self._layout, indices)
        if on_gpu(indices):
            return packed_rows(indices, self.packed, self.dtype)
        return self._dequantize(self._select(indices.flatten())).view(*indices.shape, columns)

    def dequantize(self) -> Tensor:
        """The dense matrix, in the weight's dtype."""
        return self._dequantize(self.to_mlx())

    def _select(self, indices: Tensor) -> MlxTriple:
        w, scales, biases = self._layout  # type: ignore[misc]
        # uint32 has no gather in torch: its bits are gathered as int32.
        picked = w.view(torch.int32)[indices].view(torch.uint32)
        return picked, scales[indices], None if biases is None else biases[indices]

    def _dequantize(self, triple: MlxTriple) -> Tensor:
        q = self.quantization
        return dequantize(*triple, q.group_size, q.bits, q.mode, dtype=self.dtype)


def _int4(w: Tensor, scales: Tensor, biases: Tensor, q: Quantization) -> Int4Weight:
    """MLX's matrix, or a stack of them, in the CPU kernel's layout. A matrix's codes take twice its memory."""
    if w.ndim > 2:
        return int4_stacked((_int4(*matrix, q) for matrix in zip(w, scales, biases, strict=True)), len(w))
    return int4_pack(unpack_codes(w, q.bits), scales, biases, q.group_size, q.bits)


class MergedWeight(Weight):
    """Blocks of rows that act as one matrix although their formats differ."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self.parts = tuple(parts)

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, _, columns = self.parts[0].shape
        return (*stack, sum(part.shape[-2] for part in self.parts), columns)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def _product(self, x: Tensor) -> Tensor:
        return torch.cat([part.matmul(x) for part in self.parts], dim=-1)

    def matrix(self, index: int) -> "MergedWeight":
        return MergedWeight([part.matrix(index) for part in self.parts])

    def rows(self, indices: Tensor) -> Tensor:
        raise NotImplementedError("a merged weight has no row look-up: embeddings are never merged")
