"""From files to where weights stay, by way of a little memory: a model is never on the host as a whole.

What stays on the host is read to where it stays. On the way to a GPU there are two pinned buffers: one is filled from
the file while the other is copied.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from gfxlm.ops._common import as_signed
from gfxlm.weights.safetensors_file import Extent, LazyTensor

STAGED = 2  # buffers
_BUFFER = 32 << 20  # bytes
_READ = 4 << 20  # bytes that a thread reads at a time
_READERS = 8  # a disk with many queues is not kept busy by one


class Staging:
    """Fills tensors on one device from files."""

    def __init__(self, device: torch.device, *, buffer_bytes: int = _BUFFER) -> None:
        self._device = device
        self._size = buffer_bytes
        self._buffers: list[Tensor] = []
        self._copies: list[torch.cuda.Event] = []  # out of each buffer
        self._next = 0
        self._readers = ThreadPoolExecutor(_READERS, "reader")

    def fetch(self, tensor: LazyTensor, out: Tensor) -> None:
        """Fill `out`, of the tensor's shape, and converted where it is of another type.

        A GPU's is filled in the order of its current stream. UserError where a file cannot be read.
        """
        if out.is_meta:
            return
        if tensor.parts:
            for part, place in zip(tensor.parts, out, strict=True):
                self.fetch(part, place)
        elif tensor.extent is None:
            out.copy_(tensor.read())
        else:
            start = 0
            for piece in _pieces(as_signed(out), self._size // tensor.dtype.itemsize):
                nbytes = piece.numel() * tensor.dtype.itemsize
                self._fill(tensor.extent.part(start, nbytes), tensor.dtype, piece)
                start += nbytes

    def _fill(self, extent: Extent, dtype: torch.dtype, out: Tensor) -> None:
        stored = as_signed(torch.empty(0, dtype=dtype)).dtype
        dense = out.is_contiguous() and out.stride()[-1:] in ((), (1,))
        if dense and out.device.type == "cpu" and out.dtype == stored:
            return self._read(extent, out.view(-1).view(torch.uint8))
        number = self._next = (self._next + 1) % STAGED
        buffer = self._buffer(number)[: extent.nbytes]
        self._read(extent, buffer)
        out.copy_(buffer.view(stored).view(out.shape), non_blocking=True)
        if out.is_cuda:
            self._copies[number].record()

    def _buffer(self, number: int) -> Tensor:
        """A buffer out of which everything has been copied."""
        if not self._buffers:
            pinned = self._device.type == "cuda"
            self._buffers = [torch.empty(self._size, dtype=torch.uint8, pin_memory=pinned) for _ in range(STAGED)]
            self._copies = [torch.cuda.Event() for _ in range(STAGED)] if pinned else []
        if self._copies:
            self._copies[number].synchronize()
        return self._buffers[number]

    def _read(self, extent: Extent, out: Tensor) -> None:
        starts = range(0, extent.nbytes, _READ)
        parts = [
            (extent.part(start, min(_READ, extent.nbytes - start)), out[start : start + _READ]) for start in starts
        ]
        if len(parts) < 2:
            for part, place in parts:
                part.read_into(place)
        else:
            list(self._readers.map(lambda part: part[0].read_into(part[1]), parts))


def _pieces(out: Tensor, numbers: int) -> Iterator[Tensor]:
    """Parts of `out` of so many numbers at most, in the order of the numbers."""
    if out.numel() <= numbers:
        if out.numel():
            yield out
        return
    rows = numbers // out[0].numel()
    if rows:
        yield from out.split(rows)
    else:
        for row in out:
            yield from _pieces(row, numbers)
