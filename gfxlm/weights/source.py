"""Where modules get their weights from: a checkpoint's tensors, checked, cast, merged and packed on the way."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from gfxlm.device.arena import ARENA_BYTES, arena
from gfxlm.errors import UserError
from gfxlm.ops.formats import Quantization
from gfxlm.weights.config import QuantizationMap
from gfxlm.weights.safetensors_file import LazyTensor
from gfxlm.weights.staging import Staging
from gfxlm.weights.weight import DenseWeight, MergedWeight, PackedWeight, Weight


def main_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """The float type that most bytes of a checkpoint are in, bfloat16 where there are none."""
    count: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
            count[tensor.dtype] += tensor.nbytes
    return count.most_common(1)[0][0] if count else torch.bfloat16


class WeightSource:
    """Hands out the weights of a checkpoint in MLX's names, and keeps the books on which were taken."""

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        quantization: QuantizationMap,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._tensors = tensors
        self._quantization = quantization
        self._progress = progress
        self._staging = Staging(device)
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A small floating tensor in the model's dtype, or the one given. Raises UserError if missing or misshapen."""
        self._expect(name, shape)
        return self._fetched([name], dtype or self.dtype)

    def matrix(self, paths: Sequence[str], rows: Sequence[int], columns: int, experts: int | None = None) -> Weight:
        """The matrices at these module paths as one, stacked row-wise: (sum(rows), columns), or a stack of experts."""
        stack = () if experts is None else (experts,)
        shapes = [(*stack, n, columns) for n in rows]
        formats = [self._quantization.stored(path, columns, self._tensors) for path in paths]
        if len(set(formats)) > 1:
            return MergedWeight(
                [self.matrix([path], [n], columns, experts) for path, n in zip(paths, rows, strict=True)]
            )
        if (quantization := formats[0]) is None:
            for path, shape in zip(paths, shapes, strict=True):
                self._expect(f"{path}.weight", shape)
            return DenseWeight(self._fetched([f"{path}.weight" for path in paths], self.dtype))
        stored = [self._stored(path, shape, quantization) for path, shape in zip(paths, shapes, strict=True)]
        words, scales, *biases = zip(*stored, strict=True)
        w = self._fetched(words)
        if not biases:
            return PackedWeight.from_mlx(w, self._fetched(scales), None, quantization, self.dtype)
        if self.device.type == "cpu":
            pair = (self._fetched(scales), self._fetched(biases[0]))
        else:  # a kernel reads a scale and its bias as one
            pairs = self._room((*self._joined(scales), 2), self.dtype)
            pair = (self._fill(scales, pairs[..., 0]), self._fill(biases[0], pairs[..., 1]))
        return PackedWeight.from_mlx(w, *pair, quantization, self.dtype)

    def _stored(self, path: str, shape: tuple[int, ...], q: Quantization) -> list[str]:
        """Names of MLX's packed tensors of one matrix, whose shapes are as they should be."""
        *leading, columns = shape
        names = [f"{path}.weight", f"{path}.scales"] + ([f"{path}.biases"] if q.affine else [])
        self._expect(names[0], (*leading, q.packed_columns(columns)), torch.uint32)
        for name in names[1:]:
            self._expect(name, (*leading, columns // q.group_size), None if q.affine else torch.uint8)
        if f"{path}.global_scale" in self._tensors:
            raise UserError(f"{path}.global_scale: nvfp4 weights with a global scale are not supported yet")
        return names

    def _expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        """The tensor is there in this shape and type, where None stands for any floating type."""
        if name not in self._tensors:
            raise UserError(f"{name}: missing in the checkpoint")
        found = self._tensors[name]
        if found.shape != shape:
            raise UserError(f"{name}: shape {found.shape} contradicts the config, which makes it {shape}")
        if found.dtype != dtype if dtype else not found.dtype.is_floating_point:
            raise UserError(f"{name}: stored as {found.dtype}, but it should be {dtype or 'floating'}")

    def _fetched(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Tensor:
        """Tensors joined row-wise on the device, in the one type that holds them all where none is given."""
        found = [self._tensors[name] for name in names]
        dtype = dtype or functools.reduce(torch.promote_types, (lazy.dtype for lazy in found))
        if len(found) == 1 and found[0].extent is None and not found[0].parts:
            self._book(names[0])
            return found[0].read().to(self.device, dtype)  # it may have been made where it is to stay
        return self._fill(names, self._room(self._joined(names), dtype))

    def _joined(self, names: Sequence[str]) -> tuple[int, ...]:
        """The shape of tensors that are joined row-wise."""
        shapes = [self._tensors[name].shape for name in names]
        return shapes[0] if len(shapes) == 1 else (*shapes[0][:-2], sum(s[-2] for s in shapes), shapes[0][-1])

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Where a tensor stays: if it is large, in the arena of a GPU whose memory is the host's."""
        place = arena(self.device)
        if place is None or prod(shape) * dtype.itemsize < ARENA_BYTES:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return place.empty(shape, dtype)

    def _fill(self, names: Sequence[str], out: Tensor) -> Tensor:
        """Read tensors into `out`, one below the other."""
        found = [self._tensors[name] for name in names]
        places = [out] if len(found) == 1 else out.split([lazy.shape[-2] for lazy in found], dim=-2)
        for name, lazy, place in zip(names, found, places, strict=True):
            self._staging.fetch(lazy, place)
            self._book(name)
        return out

    def _book(self, name: str) -> None:
        self._taken.add(name)
        self._progress(self._tensors[name].nbytes)

    def untouched(self) -> list[str]:
        """Names that nobody asked for."""
        return sorted(set(self._tensors) - self._taken)
