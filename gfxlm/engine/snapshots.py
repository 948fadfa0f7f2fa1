"""Recurrent states as they were: they cannot be wound back otherwise."""

import torch
from torch import Tensor

from gfxlm.nn.cache import Cache, RecurrentCache


class Snapshots:
    """The recurrent states of slots as they once were. Of other layers nothing need be kept: their rows stay."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._layers = [layer for layer in cache.layers if isinstance(layer, RecurrentCache)]
        self._lengths: dict[int, int] = {}
        self._states: dict[int, list[tuple[list[Tensor], list[Tensor]]]] = {}  # by slot, tensors and their copies

    def save(self, slot: int) -> None:
        """Keep a slot's state and length in place of what was kept of it before."""
        if not self._layers:
            return
        if slot not in self._states:
            kinds = zip(*([tensor[slot] for tensor in layer.tensors] for layer in self._layers), strict=True)
            self._states[slot] = [(list(now), [torch.empty_like(state) for state in now]) for now in kinds]
        self._lengths[slot] = self._cache.lengths[slot]
        for now, kept in self._states[slot]:
            torch._foreach_copy_(kept, now)

    def put_back(self, slot: int) -> int:
        """Let a slot be what it was; returns how many positions it has lost by that, 0 where no state is kept."""
        if not self._layers:
            return 0
        for now, kept in self._states[slot]:
            torch._foreach_copy_(now, kept)
        lost = self._cache.lengths[slot] - self._lengths[slot]
        self._cache.lengths[slot] = self._lengths[slot]
        return lost
