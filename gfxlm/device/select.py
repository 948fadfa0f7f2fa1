"""Which device to run on."""

import os

import torch

from gfxlm.device.arch import gpu_name, likely
from gfxlm.errors import UserError

# By these the user says which GPUs there are, and in which order.
_CHOICES = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1"; ROCm's are called "cuda" too), else a GPU if there is one.

    Of several GPUs, the one that `best_gpu` says. Raises UserError for a name that is unknown or a device that is not
    there.
    """
    if name is None:
        return best_gpu() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {str(name)!r}: {str(error).strip().splitlines()[0]}") from error
    return device


def best_gpu() -> torch.device | None:
    """The GPU to use where nobody says which, None where there is none.

    The first one if the environment names those that count. Else one that has kernels, is not integrated, has the most
    compute units and the most memory, in this order: beside a graphics card, the GPU in the processor is the wrong one.
    """
    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    if count == 1 or any(os.environ.get(choice) for choice in _CHOICES):
        return torch.device("cuda")
    return torch.device("cuda", max(range(count), key=_merit))


def _merit(index: int) -> tuple[bool, bool, int, int, int]:
    told = torch.cuda.get_device_properties(index)
    integrated = bool(told.is_integrated)
    return likely(gpu_name(index)).kernels, not integrated, told.multi_processor_count, told.total_memory, -index
