"""Which device to run on."""

import torch

from gfxlm.errors import UserError


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1"; ROCm's are called "cuda" too), else a GPU if there is one.

    Raises UserError for a name that is unknown or a device that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {str(name)!r}: {str(error).strip().splitlines()[0]}") from error
    return device
