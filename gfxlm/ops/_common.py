"""What several operations share: axes, the accumulation type, and unsigned integers as signed keys."""

import torch
from torch import Tensor

from gfxlm.device.arch import architecture

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


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """ValueError unless all tensors lie where the first of them does."""
    (first, x), *others = tensors.items()
    assert x is not None
    for name, given in others:
        if given is not None and given.device != x.device:
            raise ValueError(f"{op}: {name} must lie on {x.device}, where {first} is, not on {given.device}")


def on_gpu(x: Tensor) -> bool:
    """Whether kernels do the work: x lies on a GPU that they run on, or stands for such a tensor in a recording."""
    return (x.is_cuda or x.is_meta) and architecture(x.device).kernels


def as_signed(x: Tensor) -> Tensor:
    """The same bits as a signed integer, for the unsigned types that torch stores but cannot compute with."""
    return x.view(_SIGNED[x.dtype]) if x.dtype in _SIGNED else x


def sign_bit(dtype: torch.dtype) -> int:
    """What to XOR into `as_signed` bits so that they compare as this type does; 0 if nothing is needed."""
    return torch.iinfo(_SIGNED[dtype]).min if dtype in _SIGNED else 0


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to follow what is done with these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def kernels_take(*tensors: Tensor | None) -> bool:
    """Whether float kernels can work on these: all lie on a GPU, none is float64, and no gradient is wanted."""
    if wants_gradient(*tensors):
        return False
    given = (t for t in tensors if t is not None)
    return all(on_gpu(t) and t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in given)
