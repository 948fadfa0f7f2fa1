"""Small integers that the host says and the device reads, at fixed addresses and in a single copy."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 4  # words, of which a kernel may read so many at once


class Mailbox:
    """Room for so many 32-bit words, given out as tensors. Nothing is ever taken back, and nobody waits for a copy."""

    def __init__(self, words: int, device: torch.device) -> None:
        self.device = device
        self._there = torch.zeros(words, dtype=torch.int32, device=device)
        self._here = np.zeros(words, np.int32)
        self._used = 0

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros on the device, of int32 or int64. RuntimeError if there is no room for it."""
        first, count = self._used, math.prod(shape) * dtype.itemsize // 4
        if first + count > len(self._here):
            raise RuntimeError(f"mailbox: {count} words do not fit beside {first} of {len(self._here)}")
        self._used = min(-(-(first + count) // _ALIGNED) * _ALIGNED, len(self._here))
        return self._there[first : first + count].view(dtype).view(shape)

    def write(self, tensor: Tensor, numbers: Sequence[int]) -> None:
        """What one of the mailbox's tensors will hold after `send`."""
        first, count = tensor.storage_offset() * tensor.itemsize // 4, tensor.nbytes // 4
        kind = np.int64 if tensor.dtype == torch.int64 else np.int32
        self._here[first : first + count].view(kind)[:] = numbers

    def send(self) -> None:
        """Bring all that was written to the device, before whatever is launched next."""
        sent = torch.from_numpy(self._here[: self._used])
        # A copy of its own, pinned: the host may write the next one while this one waits for the device.
        sent = sent.pin_memory() if self._there.is_cuda else sent
        self._there[: self._used].copy_(sent, non_blocking=True)
