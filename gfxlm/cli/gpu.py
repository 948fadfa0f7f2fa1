"""What the commands about kernels share: which architecture is meant, and whether Triton is there."""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.device.arch import Architecture


def require_triton() -> None:
    """UserError where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "Triton is not installed: torch brings it on a GPU; on a machine without one, run: pip install triton"
        )


def here() -> "Architecture | None":
    """The architecture of this machine's GPU, or what GFXLM_ASSUME_ARCH names; None without either."""
    from gfxlm.device.arch import PORTABLE, architecture
    from gfxlm.device.select import pick_device

    arch = architecture(pick_device())
    return None if arch == PORTABLE else arch


def chosen(names: Sequence[str] | None) -> "list[Architecture]":
    """The architectures of these names, else this machine's. UserError where there is none, or no kernel for one."""
    from gfxlm.device.arch import ARCHITECTURES, named

    found = [named(name) for name in names or ()] or [arch for arch in [here()] if arch is not None]
    if not found:
        names = ", ".join(arch.name for arch in ARCHITECTURES.values() if arch.kernels)
        raise UserError(f"there is no GPU here: name an architecture with --arch, of {names}")
    for arch in found:
        if not arch.kernels:
            raise UserError(f"there are no kernels for {arch.name}: plain torch does the work there")
    return found
