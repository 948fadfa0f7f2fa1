"""The one way a kernel is started, and therefore the one place that knows what will be compiled.

Launchers call `launch`. Inside `recording` nothing runs: with tensors on the "meta" device the same launchers say what
they would have started on an architecture, which is what warm-up and the code checks compile.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from gfxlm.device.arch import Architecture, assume

Value = Tensor | int | float | None


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a kernel. `constants` are compiled in; `options` are the compiler's: num_warps, num_stages, ..."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Value, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Start it on the device of its first tensor."""
        device = next(a.device for a in self.arguments if isinstance(a, Tensor))
        if device.type != "cuda":  # the interpreter has no compiler to be told anything
            self.kernel[self.grid](*self.arguments, **self.constants)
        elif device.index == torch.cuda.current_device():
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)
        else:
            with torch.cuda.device(device):
                self.kernel[self.grid](*self.arguments, **self.constants, **self.options)

    def compile(self, arch: Architecture) -> CompiledKernel:
        """Compile exactly what `run` would start on that architecture, on any machine. Not under the interpreter."""
        target = gpu_target(arch)
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        named = {**self.constants, **self.options}
        bound, specialization, options = bind(*self.arguments, **named)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, named, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=options.__dict__)


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def launch(
    kernel: Any, grid: Sequence[int], *arguments: Value, options: dict[str, Any] | None = None, **constants: Any
) -> None:
    """Start `kernel` over `grid`: run-time arguments by position, constants by name."""
    # Said aloud, because Triton's default is about to change.
    started = Launch(kernel, tuple(grid), arguments, constants, {"enable_fp_fusion": True, **(options or {})})
    recorded = _recorded.get()
    if recorded is None:
        started.run()
    else:
        recorded.append(started)


@contextmanager
def recording(arch: Architecture) -> Iterator[list[Launch]]:
    """Collect what would be launched on that architecture, and launch nothing."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        with assume(arch):
            yield launches
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Whether launches are collected, not run."""
    return _recorded.get() is not None


def gpu_target(arch: Architecture) -> GPUTarget:
    """Triton's name for the architecture."""
    if arch.vendor == "nvidia":
        return GPUTarget("cuda", int(arch.name.removeprefix("sm_")), arch.wave)
    return GPUTarget("hip", arch.name, arch.wave)
