"""Rotary position embedding (Su et al., 2021): pairs of features turn by angles that grow with position."""

import torch
from torch import Tensor

from gfxlm.ops._common import check_devices, on_gpu, widen


def rope_angles(
    positions: Tensor,
    dims: int,
    *,
    base: float | None = None,
    freqs: Tensor | None = None,
    scale: float = 1.0,
    magnitude: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The cosines and sines that `rotate` takes, float32, each (*positions.shape, dims / 2), times `magnitude`.

    The angle of pair i at position p is `p * scale * base ** (-2i / dims)`, or `p * scale / freqs[i]`: MLX's
    `freqs` are wavelengths over 2π, not frequencies. ValueError unless exactly one of base and freqs is
    given, and dims is even, positive and twice the length of freqs.
    """
    if dims <= 0 or dims % 2:
        raise ValueError(f"rope: dims must be positive and even, got {dims}")
    if (base is None) == (freqs is None):
        raise ValueError(
            f"rope: exactly one of base and freqs must be given, got {'neither' if base is None else 'both'}"
        )
    if base is not None:
        if base <= 0:
            raise ValueError(f"rope: base must be positive, got {base}")
        # In float64: an error here is multiplied by the position.
        pair = torch.arange(0, dims, 2, dtype=torch.float64, device=positions.device)
        inverse = base ** (-pair / dims)
    elif freqs is not None:
        if freqs.shape != (dims // 2,):
            raise ValueError(f"rope: freqs must have shape ({dims // 2},) for dims {dims}, got {tuple(freqs.shape)}")
        check_devices("rope", positions=positions, freqs=freqs)
        if on_gpu(positions) and positions.dtype == torch.int64 and freqs.dtype == torch.float32:
            from gfxlm.kernels.attention.angles import angles as one_kernel

            pair = one_kernel(positions.reshape(-1), freqs.contiguous(), scale, magnitude)
            cos, sin = pair.view(2, *positions.shape, dims // 2).unbind()
            return cos, sin
        inverse = widen(freqs).reciprocal()
    angles = (positions.to(torch.float32) * scale).unsqueeze(-1) * inverse.to(torch.float32)  # (*, dims / 2)
    return magnitude * angles.cos(), magnitude * angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, traditional: bool = False) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` features of x, (..., D); the others stay as they are.

    cos and sin broadcast against x's pairs. Pairs are (i, i + dims / 2), or neighbours (2i, 2i + 1) if
    `traditional`. Computed in float32, rounded once. ValueError if x is not floating or has too few features, or cos
    and sin differ in shape or do not broadcast against x.
    """
    half = cos.shape[-1]
    if cos.shape != sin.shape:
        raise ValueError(f"rotate: cos and sin must have one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if 2 * half > x.shape[-1]:
        raise ValueError(f"rotate: cos asks for {2 * half} features, x has {x.shape[-1]}")
    if not x.is_floating_point():
        raise ValueError(f"rotate: x must be floating, got {x.dtype}")
    rows = x.shape[:-1]
    if cos.ndim > x.ndim or any(m not in (1, n) for m, n in zip(cos.shape[-2::-1], rows[::-1], strict=False)):
        raise ValueError(f"rotate: cos {tuple(cos.shape)} does not broadcast against the rows of x {tuple(x.shape)}")
    check_devices("rotate", x=x, cos=cos, sin=sin)
    turned = widen(x[..., : 2 * half])
    a, b = (turned[..., ::2], turned[..., 1::2]) if traditional else turned.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    out = (torch.stack(pair, -1).flatten(-2) if traditional else torch.cat(pair, -1)).to(x.dtype)
    return out if 2 * half == x.shape[-1] else torch.cat((out, x[..., 2 * half :]), -1)


def rope(
    a: Tensor,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | Tensor,
    freqs: Tensor | None = None,
) -> Tensor:
    """Rotary embedding of a, (B, *, T, D), whose rows sit at positions offset, offset + 1, ...

    offset is an int, or an integer tensor of shape (), (1,) or (B,). base, freqs and scale are as in
    `rope_angles`. ValueError if a is not floating or has fewer than three dimensions, or if dims, offset,
    base or freqs do not fit.
    """
    if a.ndim < 3 or not a.is_floating_point():
        raise ValueError(f"rope: a must be floating with at least 3 dimensions, got {a.dtype} {tuple(a.shape)}")
    if dims > a.shape[-1]:
        raise ValueError(f"rope: dims must not exceed the last axis of a, got dims {dims} for {tuple(a.shape)}")
    positions = _offset(offset, a).unsqueeze(-1) + torch.arange(a.shape[-2], device=a.device)  # (1 or B, T)
    cos, sin = rope_angles(positions, dims, base=base, freqs=freqs, scale=scale)
    rows = (cos.shape[0], *[1] * (a.ndim - 3), *cos.shape[-2:])
    return rotate(a, cos.view(rows), sin.view(rows), traditional=traditional)


def _offset(offset: int | Tensor, a: Tensor) -> Tensor:
    """The offset as int64, (1,) or (B,)."""
    start = torch.as_tensor(offset, device=a.device)
    if start.is_floating_point() or start.is_complex():
        raise ValueError(f"rope: offset must be an integer, got {start.dtype}")
    if start.ndim > 1 or start.numel() not in (1, a.shape[0]):
        raise ValueError(
            f"rope: offset must be one integer or one per sequence ({a.shape[0]}), got {tuple(start.shape)}"
        )
    return start.to(torch.int64).reshape(-1)
