"""Normalisation layers."""

from torch import Tensor

from gfxlm.nn.module import Module
from gfxlm.ops import rms_norm
from gfxlm.weights.source import WeightSource


class RMSNorm(Module):
    """Root mean square norm over the last axis."""

    weight: Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size = size
        self.eps = eps

    def load(self, source: WeightSource, path: str = "") -> None:
        self.weight = source.tensor(f"{path}.weight", (self.size,))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
