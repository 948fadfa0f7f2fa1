"""The one way a kernel is started, and therefore the one place that knows what will be compiled.

Launchers call `launch`. Inside `recording` nothing runs: with tensors on the "meta" device the same launchers say what
they would have started on an architecture, which is what warm-up and the code checks compile.
"""

import functools
import hashlib
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
from triton.runtime.jit import JITFunction, create_function_from_signature

from gfxlm.device.arch import Architecture, architecture, assume

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
        device = _device(self.arguments)
        if not isinstance(self.kernel, JITFunction):  # Triton's interpreter has no compiler to be told anything
            self.kernel[self.grid](*self.arguments, **self.constants)
        elif device.index == torch.cuda.current_device():
            self._start(device)
        else:
            with torch.cuda.device(device):
                self._start(device)

    def _start(self, device: torch.device) -> None:
        """Triton looks a launch up in some tens of microseconds, more than most kernels take; this does so in a few."""
        kinds = tuple(map(_kind, self.arguments))
        key = (self.kernel, device.index, kinds, tuple(self.constants.items()), tuple(self.options.items()))
        if (known := _started.get(key)) is None:
            compiled = self.kernel[self.grid](*self.arguments, **self.constants, **self.options)
            _started[key] = compiled, self.kernel.arg_names[len(self.arguments) :]
        else:
            compiled, names = known
            grid = (*self.grid, 1, 1)[:3]
            compiled[grid](*self.arguments, *(self.constants[name] for name in names))

    def specialize(self, arch: Architecture) -> "Specialized":
        """What Triton makes of the arguments on that architecture. Not under the interpreter."""
        target = gpu_target(arch)
        backend = make_backend(target)
        named = {**self.constants, **self.options}
        bound, specialization, options = _binder(self.kernel, target)(*self.arguments, **named)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, named, bound, specialization, options
        )
        return Specialized(self, target, signature, constants, attributes, options)

    def compile(self, arch: Architecture) -> CompiledKernel:
        """Compile exactly what `run` would start on that architecture, on any machine. Not under the interpreter."""
        return self.specialize(arch).compile()


@dataclass(frozen=True, slots=True)
class Specialized:
    """A launch down to what its machine code depends on."""

    launch: Launch
    target: GPUTarget
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: Any  # Triton's own, all of them

    @property
    def key(self) -> str:
        """Twelve digits that launches of a kernel share if and only if they share their machine code."""
        attributes = {place: told for place, told in self.attributes.items() if told}
        given = sorted(self.launch.options.items())
        parts = (self.launch.kernel.__name__, self.signature, sorted(self.constants.items()), attributes, given)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def compile(self) -> CompiledKernel:
        """The machine code, out of Triton's cache where it is there."""
        source = ASTSource(self.launch.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=self.target, options=self.options.__dict__)


_started: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}


_HIP = torch.version.hip is not None


def _kind(argument: Value) -> Any:
    """All that Triton may compile in about a run-time argument."""
    if isinstance(argument, Tensor):
        aligned = argument.data_ptr() & 15 == 0
        # AMD's compiler addresses small storages in another way.
        return argument.dtype, aligned, _HIP and argument.untyped_storage().nbytes() < 1 << 31
    if type(argument) is int:
        return argument == 1, argument & 15 == 0, -(2**31) <= argument < 2**31, argument < 2**63
    return type(argument), argument if isinstance(argument, bool) else None


def _device(arguments: Sequence[Value]) -> torch.device:
    return next(argument.device for argument in arguments if isinstance(argument, Tensor))


@functools.lru_cache(maxsize=1024)
def _binder(kernel: Any, target: GPUTarget) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(target))


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def launch(
    kernel: Any, grid: Sequence[int], *arguments: Value, options: dict[str, Any] | None = None, **constants: Any
) -> None:
    """Start `kernel` over `grid`: run-time arguments by position, constants by name, all but `early` (see there)."""
    options = {"enable_fp_fusion": True, **(options or {})}  # said aloud, because Triton's default is about to change
    if "early" in kernel.arg_names:
        constants["early"] = architecture(_device(arguments)).early
        if constants["early"]:
            options["launch_pdl"] = True
    started = Launch(kernel, tuple(grid), arguments, constants, options)
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
