"""Which tokens may follow in each slot, as bits on the device that the host rewrites token by token."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

_BUFFERS = 3  # the host is at most a step ahead: the first one has been read when it is needed again


class TokenMasks:
    """`bits`, int32 (S, ceil(V / 32)), bit i of word j for token 32 j + i. At first every token may follow.

    Masks go to a GPU through pinned buffers that take turns. To allocate such memory may take milliseconds: it is done
    once, and where no grammar is ever used not at all.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str) -> None:
        self.bits = torch.full((slots, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)
        self._buffers: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # (S, 1 + ceil(V / 32)): a slot and its mask

    def clear(self, slot: int) -> None:
        """Let every token follow."""
        self.bits[slot].fill_(-1)

    def write(self, slots: Sequence[int], masks: Tensor) -> None:
        """Give slots other rows, (len(slots), ceil(V / 32)) in host memory, before whatever is launched next."""
        if not self.bits.is_cuda:
            self.bits[list(slots)] = masks
            return
        buffer, sent = self._next()
        rows = buffer[: len(slots)]
        # numpy stays in this thread: others would take longer to wake than the copy takes.
        rows.numpy()[:, 0] = slots
        rows.numpy()[:, 1:] = masks.numpy()
        there = rows.to(self.bits.device, non_blocking=True)
        sent.record()
        self.bits.index_copy_(0, there[:, 0].long(), there[:, 1:])

    def _next(self) -> tuple[Tensor, torch.cuda.Event]:
        """A buffer that no copy reads from any longer."""
        if not self._buffers:
            slots, words = self.bits.shape
            for _ in range(_BUFFERS):
                buffer = torch.empty(slots, 1 + words, dtype=torch.int32, pin_memory=True)
                self._buffers.append((buffer, torch.cuda.Event()))
        buffer, sent = self._buffers[0]
        self._buffers.rotate(-1)
        if not sent.query():
            sent.synchronize()
        return buffer, sent
