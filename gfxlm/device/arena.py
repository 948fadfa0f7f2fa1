"""Memory for weights on an integrated AMD GPU, whose memory is the host's.

PyTorch's allocator there sees the part that the firmware set aside, and no more. Weights go to fine-grained memory of
the device as long as there is some, then to managed memory, and never to more of that than the host has free.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gfxlm.device.arch import architecture
from gfxlm.device.memory import available_bytes, count_in, shown
from gfxlm.errors import UserError

ARENA_BYTES = 1 << 20  # blocks are whole pages: for less than this, PyTorch's allocator wastes less

_FINE_GRAINED = 1  # hipDeviceMallocFinegrained
_GLOBAL = 1  # hipMemAttachGlobal
_KINDS = {"cpu": 1, "cuda": 10}  # DLPack's kDLCPU and kDLROCM
_LIBRARY = "libamdhip64.so"


class _Managed(ctypes.Structure):
    """DLPack's DLManagedTensor."""


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [
    ("data", ctypes.c_void_p),
    ("device_type", ctypes.c_int32),
    ("device_id", ctypes.c_int32),
    ("ndim", ctypes.c_int32),
    ("code", ctypes.c_uint8),
    ("bits", ctypes.c_uint8),
    ("lanes", ctypes.c_uint16),
    ("shape", ctypes.POINTER(ctypes.c_int64)),
    ("strides", ctypes.POINTER(ctypes.c_int64)),
    ("byte_offset", ctypes.c_uint64),
    ("context", ctypes.c_void_p),
    ("deleter", _Deleter),
]


@dataclass(frozen=True, slots=True)
class _Block:
    known: _Managed
    shape: Any  # which `known` points to
    nbytes: int
    managed: bool


class Arena:
    """Blocks of `library`, which speaks HIP's C interface, as tensors on `device`. A block goes with its last tensor.

    `free` says how many bytes the host has left.
    """

    def __init__(self, library: ctypes.CDLL, device: torch.device, free: Callable[[], int] | None = None) -> None:
        self._library = library
        self._device = device
        self._free = free or (lambda: available_bytes(torch.device("cpu")))
        self._blocks: dict[int, _Block] = {}  # by the address of what DLPack knows them by
        self._room = 0  # what the host had left before the managed blocks
        self._most = 0
        self._deleter = _Deleter(self._delete)
        # Tensors may outlive the arena, and this module: who frees their blocks must still be there then.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._deleter))
        for name in ("hipExtMallocWithFlags", "hipMallocManaged"):
            getattr(library, name).argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint]
        library.hipFree.argtypes = [ctypes.c_void_p]

    @property
    def held_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in self._blocks.values())

    @property
    def most_bytes(self) -> int:
        """The most that all blocks have had so far."""
        return self._most

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of whatever was in memory. UserError, with its size and the limit, where there is none for it."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=self._device)
        address, managed = self._allocate(nbytes)
        return self._wrapped(address, nbytes, managed).view(dtype).view(shape)

    def _allocate(self, nbytes: int) -> tuple[int, bool]:
        """The address of a block, and whether its memory is managed."""
        block = ctypes.c_void_p()
        first = self._library.hipExtMallocWithFlags(ctypes.byref(block), nbytes, _FINE_GRAINED)
        if first == 0 and block.value:
            return block.value, False
        free = self._managed_room()
        if nbytes > free:
            raise UserError(
                f"{shown(nbytes)} of weights do not fit: the GPU has no memory left (HIP error {first}), "
                f"and of the host's {shown(free)} are free"
            )
        second = self._library.hipMallocManaged(ctypes.byref(block), nbytes, _GLOBAL)
        if second != 0 or not block.value:
            raise UserError(
                f"{shown(nbytes)} of weights were refused: HIP errors {first} for the GPU's memory and {second} for "
                f"managed memory, although {shown(free)} are free"
            )
        return block.value, True

    def _managed_room(self) -> int:
        """What managed memory may still take. The host misses its pages only once they are written to."""
        free, held = self._free(), sum(block.nbytes for block in self._blocks.values() if block.managed)
        if not held:
            self._room = free
        return max(0, min(free, self._room - held))

    def _wrapped(self, address: int, nbytes: int, managed: bool) -> Tensor:
        """uint8 (nbytes,) over a block."""
        shape = (ctypes.c_int64 * 1)(nbytes)
        index, kind = self._device.index or 0, _KINDS[self._device.type]
        known = _Managed(address, kind, index, 1, 1, 8, 1, shape, None, 0, None, self._deleter)
        self._blocks[ctypes.addressof(known)] = _Block(known, shape, nbytes, managed)
        self._most = max(self._most, self.held_bytes)
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        wrapped: Tensor = from_dlpack(capsule(ctypes.addressof(known), b"dltensor", None))
        return wrapped

    def _delete(self, pointer: Any) -> None:
        block = self._blocks.pop(ctypes.addressof(pointer.contents))
        self._library.hipFree(block.known.data)


def unified(device: torch.device) -> bool:
    """Whether weights on that device, or on the one that is assumed, belong into an arena."""
    if device.type == "cuda" and torch.version.hip:
        return bool(torch.cuda.get_device_properties(device).is_integrated)
    arch = architecture(device)
    return arch.vendor == "amd" and arch.integrated


@functools.lru_cache
def arena(device: torch.device) -> Arena | None:
    """The device's arena, None where PyTorch's allocator does it all."""
    if device.type != "cuda" or not torch.version.hip or not unified(device):
        return None
    made = Arena(ctypes.CDLL(str(_loaded(_LIBRARY))), device)
    count_in(made, device)
    return made


def _loaded(name: str) -> Path:
    """The file of a library that this process has loaded: a second HIP beside PyTorch's would know nothing of it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(name):
            return path
    raise UserError(f"{name} is not loaded: this PyTorch is not one for AMD GPUs")
