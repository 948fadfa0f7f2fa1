"""Where modules get their weights from: a checkpoint's tensors, checked, cast, merged and packed on the way."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.ops.formats import Quantization
from gfxlm.weights.config import QuantizationMap
from gfxlm.weights.safetensors_file import LazyTensor
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
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A small floating tensor in the model's dtype, or the one given. Raises UserError if missing or misshapen."""
        self._expect(name, shape)
        return self._read(name).to(self.device, dtype or self.dtype)

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
            return DenseWeight(_cat_rows([self.tensor(f"{p}.weight", s) for p, s in zip(paths, shapes, strict=True)]))
        parts = [self._stored(path, shape, quantization) for path, shape in zip(paths, shapes, strict=True)]
        w, scales, *biases = (_cat_rows(list(tensors)) for tensors in zip(*parts, strict=True))
        return PackedWeight.from_mlx(w, scales, biases[0] if biases else None, quantization, self.dtype)

    def _stored(self, path: str, shape: tuple[int, ...], q: Quantization) -> tuple[Tensor, ...]:
        """MLX's packed tensors of one matrix, with their shapes checked."""
        *leading, columns = shape
        names = [f"{path}.weight", f"{path}.scales"] + ([f"{path}.biases"] if q.affine else [])
        self._expect(names[0], (*leading, q.packed_columns(columns)), torch.uint32)
        for name in names[1:]:
            self._expect(name, (*leading, columns // q.group_size), None if q.affine else torch.uint8)
        if f"{path}.global_scale" in self._tensors:
            raise UserError(f"{path}.global_scale: nvfp4 weights with a global scale are not supported yet")
        return tuple(self._read(name).to(self.device) for name in names)

    def _expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        """The tensor is there in this shape and type, where None stands for any floating type."""
        if name not in self._tensors:
            raise UserError(f"{name}: missing in the checkpoint")
        found = self._tensors[name]
        if found.shape != shape:
            raise UserError(f"{name}: shape {found.shape} contradicts the config, which makes it {shape}")
        if found.dtype != dtype if dtype else not found.dtype.is_floating_point:
            raise UserError(f"{name}: stored as {found.dtype}, but it should be {dtype or 'floating'}")

    def _read(self, name: str) -> Tensor:
        self._taken.add(name)
        lazy = self._tensors[name]
        tensor = lazy.read()
        self._progress(lazy.nbytes)
        return tensor

    def untouched(self) -> list[str]:
        """Names that nobody asked for."""
        return sorted(set(self._tensors) - self._taken)


def _cat_rows(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].dtype == torch.uint32:
        # uint32 has no cat in torch: its bits are joined as int32.
        return torch.cat([t.view(torch.int32) for t in tensors], dim=-2).view(torch.uint32)
    return torch.cat(tensors, dim=-2)
