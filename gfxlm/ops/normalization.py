"""Normalisation over the last axis: statistics in float32, rounded to the result's type before the weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.ops._common import check_devices, kernels_take, widen


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang and Sennrich, 2019).

    x is (..., D), weight (D,) or None. The result has the type that x and weight promote to. ValueError if x
    has no dimension or is not floating, or if weight is not (D,).
    """
    dtype = _result_type("rms_norm", x, weight, None)
    if kernels_take(x, weight):
        from gfxlm.kernels.basic import norm

        return norm.rms_norm(x, _adjacent(weight), eps, dtype)[0]
    wide = widen(x)
    mean_square: Tensor = torch.linalg.vecdot(wide, wide).unsqueeze(-1) / x.shape[-1]
    normalized = (wide * (mean_square + eps).sqrt().reciprocal()).to(dtype)
    return normalized if weight is None else normalized * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum, which is rounded to the type of x and residual first.

    x and residual are (..., D), weight (D,) or None. ValueError if their shapes differ, and as for `rms_norm`.
    """
    _check_like("add_rms_norm", "residual", residual, x)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if _result_type("add_rms_norm", x, weight, None) == x.dtype == dtype and kernels_take(x, residual, weight):
        from gfxlm.kernels.basic import norm

        normed, total = norm.rms_norm(x, _adjacent(weight), eps, dtype, residual=residual)
        assert total is not None
        return normed, total
    total = x + residual
    return rms_norm(total, weight, eps), total


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """rms_norm(x) * silu(gate) over the last axis, the product in float32 and rounded to gate's type.

    x and gate are (..., D), weight (D,) or None. ValueError if their shapes differ, and as for `rms_norm`.
    """
    _check_like("gated_rms_norm", "gate", gate, x)
    dtype = _result_type("gated_rms_norm", x, weight, None)
    if kernels_take(x, gate, weight):
        from gfxlm.kernels.basic import norm

        return norm.rms_norm(x, _adjacent(weight), eps, dtype, gate=gate)[0]
    return (rms_norm(x, weight, eps) * F.silu(widen(gate))).to(gate.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis (Ba et al., 2016).

    x is (..., D), weight and bias (D,) or None. The result has the type that the tensors promote to; without
    a weight it has x's. ValueError if x has no dimension or is not floating, or if weight or bias is not
    (D,).
    """
    dtype = _result_type("layer_norm", x, weight, bias)
    if kernels_take(x, weight, bias):
        from gfxlm.kernels.basic import norm

        return norm.layer_norm(x, _adjacent(weight), _adjacent(bias), eps, dtype)
    out = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    if weight is not None:
        out = out * weight
    return out if bias is None else (out + bias).to(dtype)


def _result_type(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least one dimension")
    check_devices(op, x=x, weight=weight, bias=bias)
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


def _check_like(op: str, name: str, given: Tensor, x: Tensor) -> None:
    if given.shape != x.shape:
        raise ValueError(f"{op}: {name} must have x's shape {tuple(x.shape)}, got {tuple(given.shape)}")
    if not given.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating, got {given.dtype}")
    check_devices(op, x=x, **{name: given})


def _adjacent(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x²) + eps) over the last axis, float32 whatever x's type is; float64 stays.

    ValueError if x has no dimension or is not floating.
    """
    _result_type("l2_normalize", x, None, None)
    if kernels_take(x):
        from gfxlm.kernels.basic import norm

        return norm.rms_norm(x, None, eps, torch.float32, mean=False)[0]
    wide = widen(x)
    square: Tensor = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
    return wide * (square + eps).sqrt().reciprocal()
