"""Rotary position embeddings, in the scalings that checkpoints ask for."""

import math
from typing import Any

import torch
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.nn.module import Module
from gfxlm.ops import rope_angles
from gfxlm.weights.source import WeightSource

Scaling = dict[str, Any]
_KINDS = ("default", "dynamic", "mrope", "linear", "llama3", "yarn", "deepseek_yarn", "longrope")


class RoPE(Module):
    """Angles of the first `dims` features of a head. One per model: every layer rotates by the same angles.

    `scaling` is the config's `rope_scaling`; its types mean what they mean in mlx-lm. "dynamic" changes nothing up to
    the context that the model was trained for, which is the `limit` here.
    """

    def __init__(self, dims: int, base: float, scaling: Scaling | None, max_context: int) -> None:
        super().__init__()
        if dims <= 0 or dims % 2:
            raise UserError(f"config.json: heads need an even number of rotary dimensions, not {dims}")
        self.dims = dims
        self.position_scale = 1.0
        self.magnitude = 1.0
        freqs = base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        scaling = scaling or {}
        kind = scaling.get("type") or scaling.get("rope_type") or "default"
        if kind not in _KINDS:
            raise UserError(f"rope_scaling: type {kind!r} is not known")
        self.limit = max_context if kind == "dynamic" else None
        try:
            if kind == "linear":
                self.position_scale = 1 / scaling["factor"]
            elif kind == "llama3":
                freqs = _llama3(freqs, scaling)
            elif kind in ("yarn", "deepseek_yarn"):
                freqs, self.magnitude = _yarn(freqs, base, scaling)
            elif kind == "longrope":
                freqs, self.magnitude = _longrope(freqs, scaling, max_context)
        except KeyError as error:
            raise UserError(f"rope_scaling: type {kind!r} needs {error}") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"rope_scaling: type {kind!r}: {error}") from error
        if not bool((freqs.isfinite() & (freqs > 0)).all()):
            raise UserError(f"rope_scaling: type {kind!r}: its numbers give frequencies of zero or infinity")
        self.freqs = freqs

    def load(self, source: WeightSource, path: str = "") -> None:
        # Here and not in every step: a copy from the host has no place in a captured graph.
        self.freqs = self.freqs.to(source.device)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions (N,): fp32 (N, 1, dims / 2) each."""
        cos, sin = rope_angles(
            positions, self.dims, freqs=self.freqs, scale=self.position_scale, magnitude=self.magnitude
        )
        return cos[:, None], sin[:, None]


def _llama3(freqs: Tensor, scaling: Scaling) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between are blended."""
    factor = scaling["factor"]
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    context = scaling.get("original_max_position_embeddings", 8192)
    waves = 2 * math.pi * freqs
    smooth = (context / waves - low) / (high - low)
    blended = freqs / ((1 - smooth) / factor + smooth)
    stretched = torch.where(waves > context / low, freqs * factor, freqs)
    return torch.where((waves > context / high) & (waves < context / low), blended, stretched)


def _yarn(freqs: Tensor, base: float, scaling: Scaling) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate the slow dimensions, keep the fast ones, and scale the magnitude."""
    factor = scaling["factor"]
    context = scaling.get("original_max_position_embeddings", 4096)
    dims = 2 * len(freqs)

    def correction(rotations: float) -> float:
        return dims * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    low = max(math.floor(correction(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(correction(scaling.get("beta_slow", 1))), dims - 1)
    ramp = ((torch.arange(len(freqs)) - low) / (high - low or 0.001)).clamp(0, 1)
    inter = factor * freqs
    mixed = inter * freqs / (inter * (1 - ramp) + freqs * ramp)
    return mixed, magnitude(scaling.get("mscale", 1)) / magnitude(scaling.get("mscale_all_dim", 0))


def _longrope(freqs: Tensor, scaling: Scaling, max_context: int) -> tuple[Tensor, float]:
    """LongRoPE's factors for long contexts, as mlx-lm uses them at every length."""
    context = scaling["original_max_position_embeddings"]
    ratio = max_context / context
    magnitude = math.sqrt(1 + math.log(ratio) / math.log(context)) if ratio > 1 else 1.0
    factors = torch.tensor(scaling["long_factor"], dtype=torch.float32)
    if factors.shape != freqs.shape:
        raise ValueError(f"long_factor must have {len(freqs)} numbers, but has shape {tuple(factors.shape)}")
    return factors * freqs, magnitude
