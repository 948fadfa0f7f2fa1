"""Normalisation over the last axis: statistics in float32, rounded to the result's type before the weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.ops._common import widen


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang and Sennrich, 2019).

    x is (..., D), weight (D,) or None. The result has the type that x and weight promote to. ValueError if x
    has no dimension or is not floating, or if weight is not (D,).
    """
    dtype = _result_type("rms_norm", x, weight, None)
    wide = widen(x)
    mean_square: Tensor = torch.linalg.vecdot(wide, wide).unsqueeze(-1) / x.shape[-1]
    normalized = (wide * (mean_square + eps).sqrt().reciprocal()).to(dtype)
    return normalized if weight is None else normalized * weight


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis (Ba et al., 2016).

    x is (..., D), weight and bias (D,) or None. The result has the type that the tensors promote to; without
    a weight it has x's. ValueError if x has no dimension or is not floating, or if weight or bias is not
    (D,).
    """
    dtype = _result_type("layer_norm", x, weight, bias)
    out = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    if weight is not None:
        out = out * weight
    return out if bias is None else (out + bias).to(dtype)


def _result_type(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least one dimension")
    dtype = x.dtype
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} must have shape {tuple(x.shape[-1:])} to match the last axis of x, "
                f"got {tuple(parameter.shape)}"
            )
        if weight is not None:  # MLX: a bias alone does not widen the result
            dtype = torch.promote_types(dtype, parameter.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: x must be floating, got {x.dtype}")
    return dtype


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x²) + eps) over the last axis, float32 whatever x's type is."""
    wide = widen(x)
    square: Tensor = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
    return wide * (square + eps).sqrt().reciprocal()
