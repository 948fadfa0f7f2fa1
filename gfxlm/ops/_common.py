"""What several operations share: axes, the accumulation type, and unsigned integers as signed keys."""

import torch
from torch import Tensor

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class AxisError(ValueError, IndexError):
    """An axis that the tensor does not have: IndexError, as in MLX, and ValueError, as all bad arguments."""


def normalize_axis(op: str, axis: int, ndim: int) -> int:
    """The axis counted from the front. AxisError if a tensor of `ndim` dimensions has no such axis."""
    if not -ndim <= axis < ndim:
        raise AxisError(f"{op}: axis {axis} is out of bounds for a tensor of {ndim} dimensions")
    return axis % ndim


def widen(x: Tensor) -> Tensor:
    """x in the type that arithmetic is done in: float64 stays, all else becomes float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def on_gpu(x: Tensor) -> bool:
    """Whether kernels do the work: x lies on a GPU, or stands for a tensor that does while launches are recorded."""
    return x.is_cuda or x.is_meta


def as_signed(x: Tensor) -> Tensor:
    """The same bits as a signed integer, for the unsigned types that torch stores but cannot compute with."""
    return x.view(_SIGNED[x.dtype]) if x.dtype in _SIGNED else x


def sign_bit(dtype: torch.dtype) -> int:
    """What to XOR into `as_signed` bits so that they compare as this type does; 0 if nothing is needed."""
    return torch.iinfo(_SIGNED[dtype]).min if dtype in _SIGNED else 0
