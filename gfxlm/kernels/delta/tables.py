"""Entries of the tuning tables: capitals are compiled in as constants, the rest are the compiler's options."""

from typing import Any

import torch

from gfxlm.kernels.tuning import Fact, config


def tuned(op: str, device: torch.device, **facts: Fact) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants and the compiler options of an operation for these facts."""
    use = config(op, device, **facts)
    constants = {name: value for name, value in use.items() if name.isupper()}
    return constants, {name: value for name, value in use.items() if name not in constants}
