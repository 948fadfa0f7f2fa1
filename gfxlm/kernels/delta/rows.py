"""Where the sequences of a flattened batch lie, as the kernels are told: int32 tables, made once a batch."""

import functools

import torch
from torch import Tensor

CHUNK = 64

Bounds = tuple[tuple[int, int], ...]  # first row and the one behind the last, of each sequence


@functools.lru_cache(maxsize=16)
def span_table(bounds: Bounds, device: torch.device) -> Tensor:
    """(sequences, 2): first row, and the one behind the last."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=16)
def chunk_table(bounds: Bounds, device: torch.device) -> Tensor:
    """(chunks, 3): a chunk's first row, and its sequence's first row and the one behind its last."""
    chunks = [(row, first, stop) for first, stop in bounds for row in range(first, stop, CHUNK)]
    return torch.tensor(chunks, dtype=torch.int32, device=device)
