"""Reading safetensors: a length, a JSON header, and raw little-endian data.

Plain reads into ordinary memory: a map of the file handed to a GPU driver hangs on some integrated GPUs.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gfxlm.errors import UserError

_DTYPES = {
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
class LazyTensor:
    """A tensor that is read when it is asked for: shape and dtype are known, the data are still on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize

    def map(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> "LazyTensor":
        """The same tensor with `function` applied once it is read; `shape` where the function changes it."""
        return LazyTensor(self.shape if shape is None else shape, self.dtype, lambda: function(self.read()))


def stacked(tensors: list[LazyTensor]) -> LazyTensor:
    """Tensors of one shape, joined along a new first axis when read."""
    first = tensors[0]
    return LazyTensor((len(tensors), *first.shape), first.dtype, lambda: torch.stack([t.read() for t in tensors]))


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file by name. Raises UserError for a truncated or corrupt file before any data are read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise UserError(f"{path}: not a safetensors file, or cut off in its header ({size} bytes)")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _entry(path, name, fields, 8 + length, size) for name, fields in header.items()}
    except (
        UnicodeDecodeError,
        json.JSONDecodeError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: corrupt safetensors header ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _entry(path: Path, name: str, fields: dict[str, object], data: int, size: int) -> LazyTensor:
    dtype = _DTYPES.get(str(fields["dtype"]))
    if dtype is None:
        raise UserError(f"{path}: tensor {name} has the unknown type {fields['dtype']}")
    shape = tuple(int(n) for n in fields["shape"])  # type: ignore[attr-defined]
    start, stop = (int(n) for n in fields["data_offsets"])  # type: ignore[attr-defined]
    if min(shape, default=0) < 0 or start < 0 or stop - start != prod(shape) * dtype.itemsize:
        raise UserError(f"{path}: corrupt header: tensor {name} of shape {shape} does not take {stop - start} bytes")
    if data + stop > size:
        raise UserError(f"{path}: truncated: tensor {name} ends at byte {data + stop}, the file has {size}")
    return LazyTensor(shape, dtype, lambda: _read(path, data + start, stop - start).view(dtype).reshape(shape))


def _read(path: Path, offset: int, nbytes: int) -> Tensor:
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    if nbytes == 0:
        return buffer
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        view, done = memoryview(buffer.numpy().data), 0
        while done < nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise UserError(f"{path}: the file became shorter while it was read")
            done += count
    return buffer
