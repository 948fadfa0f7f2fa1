"""The quantisation formats of MLX: which bits, groups and modes there are, and how codes lie in memory."""

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
_AFFINE_GROUPS = (32, 64, 128)
_AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How one matrix is quantised: every `group_size` neighbours along K share a scale, a code has `bits` bits."""

    group_size: int
    bits: int
    mode: str = "affine"

    @classmethod
    def resolve(cls, group_size: int | None = None, bits: int | None = None, mode: str = "affine") -> "Quantization":
        """Fill in MLX's defaults for the mode and refuse what MLX does not have.

        Raises ValueError that names the argument and lists the values there are.
        """
        if mode not in _DEFAULTS:
            raise ValueError(f"mode: {mode!r} is not one of {', '.join(MODES)}")
        default_group, default_bits = _DEFAULTS[mode]
        group_size = default_group if group_size is None else group_size
        bits = default_bits if bits is None else bits
        groups, widths = (_AFFINE_GROUPS, _AFFINE_BITS) if mode == "affine" else ((default_group,), (default_bits,))
        if group_size not in groups:
            raise ValueError(f"group_size: {group_size} is not one of {groups} for mode {mode!r}")
        if bits not in widths:
            raise ValueError(f"bits: {bits} is not one of {widths} for mode {mode!r}")
        return cls(group_size, bits, mode)

    @property
    def affine(self) -> bool:
        """True where the weight is `scale * code + bias`, with unsigned codes."""
        return self.mode == "affine"

    def packed_columns(self, columns: int) -> int:
        """Number of 32-bit words that hold `columns` codes."""
        return columns * self.bits // 32


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into one bit stream along the last axis, least significant bit first, as MLX lays it out.

    `codes` is uint8 (..., K) with K * bits divisible by 32; returns uint32 (..., K * bits / 32).
    """
    period = lcm(bits, 8)
    per_period, n_bytes = period // bits, period // 8
    grouped = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_period, per_period)
    stream = torch.zeros(*grouped.shape[:-1], n_bytes, dtype=torch.uint8, device=codes.device)
    for i in range(per_period):
        first, shift = divmod(i * bits, 8)
        stream[..., first] |= grouped[..., i] << shift
        if shift + bits > 8:
            stream[..., first + 1] |= grouped[..., i] >> (8 - shift)
    return stream.flatten(-2).contiguous().view(torch.uint32)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The codes in a packed bit stream: uint32 (..., K * bits / 32) to uint8 (..., K)."""
    period = lcm(bits, 8)
    per_period, n_bytes = period // bits, period // 8
    stream = packed.contiguous().view(torch.uint8)
    stream = stream.reshape(*stream.shape[:-1], stream.shape[-1] // n_bytes, n_bytes)
    codes = torch.empty(*stream.shape[:-1], per_period, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for i in range(per_period):
        first, shift = divmod(i * bits, 8)
        code = stream[..., first] >> shift if shift else stream[..., first]
        if shift + bits > 8:
            code |= stream[..., first + 1] << (8 - shift)
        torch.bitwise_and(code, mask, out=codes[..., i])
    return codes.flatten(-2)
