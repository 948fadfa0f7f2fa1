"""Reading safetensors: a length, a JSON header, and raw little-endian data.

Plain reads into ordinary memory: a map of the file handed to a GPU driver hangs on some integrated GPUs.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gfxlm.errors import UserError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Extent:
    """So many bytes of a file."""

    path: Path
    offset: int
    nbytes: int

    def part(self, start: int, nbytes: int) -> "Extent":
        """Some of these bytes, counted from the first."""
        return Extent(self.path, self.offset + start, nbytes)

    def read_into(self, out: Tensor) -> None:
        """Read them into uint8 (nbytes,) on the host. UserError where the file cannot be read, or ends before."""
        view, done = memoryview(out.numpy().data), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while done < self.nbytes:
                    count = file.readinto(view[done:])
                    if not count:
                        raise UserError(f"{self.path}: the file became shorter while it was read")
                    done += count
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is read when it is asked for: shape and dtype are known, the data are still on disk.

    `parts` are the tensors that a stack is made of, for those who can do with one at a time; `extent` is where the
    data of one that is stored as it is lie, for those who know where they are to go.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    parts: tuple["LazyTensor", ...] = ()
    extent: Extent | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize

    def map(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> "LazyTensor":
        """The same tensor with `function` applied once it is read; `shape` where the function changes it."""
        return LazyTensor(self.shape if shape is None else shape, self.dtype, lambda: function(self.read()))


def stacked(tensors: list[LazyTensor]) -> LazyTensor:
    """Tensors of one shape, joined along a new first axis when read."""
    shape = (len(tensors), *tensors[0].shape)
    return LazyTensor(shape, tensors[0].dtype, lambda: torch.stack([t.read() for t in tensors]), tuple(tensors))


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file by name. Raises UserError for a truncated or corrupt file before any data are read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise UserError(f"{path}: not a safetensors file, or cut off in its header ({size} bytes)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: corrupt: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: corrupt: the header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields) for name, fields in header.items()}
    _check_extents(path, entries, size - 8 - length)
    return {name: entry.lazy(path, 8 + length) for name, entry in entries.items()}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor as the header describes it; `start` and `stop` count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def lazy(self, path: Path, data: int) -> LazyTensor:
        extent = Extent(path, data + self.start, self.stop - self.start)

        def read() -> Tensor:
            buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
            extent.read_into(buffer)
            return buffer.view(self.dtype).reshape(self.shape)

        return LazyTensor(self.shape, self.dtype, read, extent=extent)


def _entry(path: Path, name: str, fields: object) -> _Entry:
    if not name.isprintable():
        raise UserError(f"{path}: corrupt: a tensor is named {name!r}")
    match fields:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [start, stop]} if all(
            type(n) is int for n in (*shape, start, stop)
        ):
            pass
        case _:
            raise UserError(f"{path}: corrupt: tensor {name} lacks a proper dtype, shape or data_offsets")
    if kind not in DTYPES:
        raise UserError(f"{path}: tensor {name} has the unknown type {kind!r}")
    entry = _Entry(DTYPES[kind], tuple(shape), start, stop)
    # Zeros are left out of the second product: a dimension beside one must fit torch's 64-bit strides all the same.
    fits = stop - start == prod(shape) * entry.dtype.itemsize and prod(n for n in shape if n) < 1 << 63
    if min(shape, default=0) < 0 or start < 0 or not fits:
        raise UserError(f"{path}: corrupt: tensor {name} of shape {entry.shape} does not take {stop - start} bytes")
    return entry


def _check_extents(path: Path, entries: dict[str, _Entry], size: int) -> None:
    """Every tensor lies within the `size` bytes of data, and no two share any."""
    ordered = sorted((e.start, e.stop, name) for name, e in entries.items() if e.stop > e.start)
    for _, stop, name in ordered:
        if stop > size:
            raise UserError(f"{path}: truncated: tensor {name} ends at byte {stop} of the data, which are {size}")
    for (_, stop, name), (start, _, other) in pairwise(ordered):
        if start < stop:
            raise UserError(f"{path}: corrupt: tensors {name} and {other} overlap")
