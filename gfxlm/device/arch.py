"""Facts about GPU architectures, and which of them a tensor's device is."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial

import torch

from gfxlm.errors import UserError


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a kernel's tiles are chosen by, and what its code is held against.

    `example` is the part that units, clock (GHz) and bandwidth (GB/s) are taken from, 0 where none is meant. Registers
    are the vector registers that the waves of one SIMD share, each as wide as a wave; four SIMDs share `pool_bytes`.
    """

    name: str
    family: str  # whose tuning tables serve where this architecture has none of its own
    wave: int = 32  # lanes that run in step
    matrix: str = "none"  # wmma, mfma, mma, wgmma
    shared_bytes: int = 64 << 10  # of one program: LDS, or shared memory
    kernels: bool = True  # false where no Triton kernel of ours runs: plain torch does the work
    early: bool = False  # starts a kernel before the one before it has ended
    integrated: bool = False  # its memory is the host's
    cache_line: int = 128  # bytes of a line of L2
    stride_cliff: int = 0  # bytes: rows that lie a multiple of this apart are read slowly; 0 where none is known
    registers: int = 1024
    register_lot: int = 16  # registers are handed out in lots
    waves: int = 16  # at most on one SIMD
    pool_bytes: int = 128 << 10
    example: str = ""
    units: int = 0
    clock: float = 0.0
    bandwidth: float = 0.0
    operations: int = 0  # of bf16 products, of one unit in a clock

    @property
    def matrix_rate(self) -> float:
        """Operations a second of bf16 products on the example part, 0 where that is not known."""
        return self.units * self.clock * 1e9 * self.operations

    @property
    def vendor(self) -> str:
        """amd, nvidia or none."""
        return "amd" if self.name.startswith("gfx") else "nvidia" if self.name.startswith("sm_") else "none"

    def vector_share(self, instructions: float, nbytes: float) -> float:
        """Time of that many vector instructions a lane, as a share of the time the example part reads `nbytes` in."""
        lanes_a_second = self.units * 64 * self.clock * 1e9  # an AMD unit issues 64 lanes a clock
        return instructions / lanes_a_second / (nbytes / (self.bandwidth * 1e9))

    def occupancy(self, vgprs: int, shared: int, num_warps: int) -> int:
        """Waves of a kernel that one SIMD of an AMD unit holds at a time."""
        lots = max(1, -(-vgprs // self.register_lot))
        by_registers = self.registers // (lots * self.register_lot)
        by_shared = self.pool_bytes // shared * num_warps // 4 if shared else self.waves
        return min(self.waves, by_registers, by_shared)


_cdna = partial(
    Architecture, family="gfx9", wave=64, matrix="mfma", registers=512, register_lot=8, waves=8, pool_bytes=64 << 10
)
_rdna3 = partial(Architecture, family="gfx11", matrix="wmma", operations=512)
_rdna3_large = partial(_rdna3, registers=1536, register_lot=24)
_rdna4 = partial(Architecture, family="gfx12", matrix="wmma", registers=1536, register_lot=24, operations=1024)
_nvidia = partial(Architecture, matrix="mma")

# Units, register files and LDS are ROCm's table of GPU specifications; boost clocks and bandwidths AMD's product pages,
# of APUs with the fastest memory they take; operations of a unit in a clock GPUOpen's articles on WMMA (512 on RDNA 3,
# 1024 on RDNA 4) and the CDNA 2, 3 and 4 white papers; registers' lots LLVM's. Stride cliffs: for MI300 AMD's advice on
# the strides of matrices, for gfx1151 what AMD's engineers measured and pad for in vLLM; gfx1150 has none, they say.
ARCHITECTURES = {
    arch.name: arch
    for arch in (
        _cdna("gfx90a", example="MI250X, one die", units=110, clock=1.7, bandwidth=1638, operations=1024),
        _cdna("gfx942", example="MI300X", units=304, clock=2.1, bandwidth=5300, operations=2048, stride_cliff=512),
        _cdna(
            "gfx950",
            shared_bytes=160 << 10,
            pool_bytes=160 << 10,
            example="MI350X",
            units=256,
            clock=2.2,
            bandwidth=8000,
            operations=4096,
        ),
        _rdna3_large("gfx1100", example="RX 7900 XTX", units=96, clock=2.5, bandwidth=960),
        _rdna3_large("gfx1101", example="RX 7800 XT", units=60, clock=2.43, bandwidth=624),
        _rdna3("gfx1102", example="RX 7600", units=32, clock=2.655, bandwidth=288),
        _rdna3("gfx1103", integrated=True, example="Radeon 780M", units=12, clock=2.7, bandwidth=120),
        _rdna3("gfx1150", integrated=True, example="Radeon 890M", units=16, clock=2.9, bandwidth=128),
        _rdna3_large(
            "gfx1151",
            integrated=True,
            example="Radeon 8060S",
            units=40,
            clock=2.9,
            bandwidth=256,
            stride_cliff=1024,
        ),
        _rdna3("gfx1152", integrated=True, example="Radeon 860M", units=8, clock=3.0, bandwidth=128),
        _rdna4("gfx1200", example="RX 9060 XT", units=32, clock=3.13, bandwidth=320),
        _rdna4("gfx1201", example="AI PRO R9700", units=64, clock=2.92, bandwidth=640),
        Architecture("gfx1030", "gfx10", kernels=False, example="RX 6900 XT", units=80, clock=2.25, bandwidth=512),
        _nvidia("sm_80", "sm_80", shared_bytes=163 << 10),
        _nvidia("sm_86", "sm_80", shared_bytes=99 << 10),
        _nvidia("sm_89", "sm_80", shared_bytes=99 << 10),
        _nvidia("sm_90", "sm_90", matrix="wgmma", shared_bytes=227 << 10, early=True),
        _nvidia("sm_100", "sm_90", shared_bytes=227 << 10, early=True),
        _nvidia("sm_120", "sm_80", shared_bytes=99 << 10, early=True),
    )
}
AMD = tuple(name for name in ARCHITECTURES if name.startswith("gfx"))
PORTABLE = Architecture("portable", "portable", shared_bytes=32 << 10)

_assumed: ContextVar[Architecture | None] = ContextVar("assumed", default=None)


def named(name: str) -> Architecture:
    """The architecture of that name. UserError if it is not known."""
    if name not in ARCHITECTURES:
        raise UserError(f"architecture {name!r} is not known; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


@contextmanager
def assume(arch: Architecture) -> Iterator[None]:
    """Make every decision as on that architecture, whatever this machine is."""
    token = _assumed.set(arch)
    try:
        yield
    finally:
        _assumed.reset(token)


def architecture(device: torch.device) -> Architecture:
    """What is assumed (`assume`, GFXLM_ASSUME_ARCH), else the device's own; PORTABLE where there is none."""
    assumed = _assumed.get()
    return assumed if assumed is not None else _detect(device)


@functools.lru_cache
def _detect(device: torch.device) -> Architecture:
    if name := os.environ.get("GFXLM_ASSUME_ARCH"):
        return named(name)
    if device.type != "cuda":
        return PORTABLE
    arch = recognized(gpu_name(device))
    if arch.kernels and importlib.util.find_spec("triton") is None:
        warnings.warn("triton is not installed: plain torch does the work, slowly", stacklevel=2)
        return replace(arch, kernels=False)
    return arch


def gpu_name(device: torch.device | int) -> str:
    """What one of torch's GPUs calls itself: gfx1151, sm_90."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def recognized(name: str) -> Architecture:
    """The architecture of a GPU that calls itself so; what is not known, or has no kernels, is warned of."""
    arch = likely(name)
    if not arch.kernels:
        warnings.warn(f"there are no kernels for {name}: plain torch does the work, slowly", stacklevel=3)
    elif name not in ARCHITECTURES:
        warnings.warn(f"{name} is not known: it is treated as its relatives are", stacklevel=3)
    return arch


def likely(name: str) -> Architecture:
    """The architecture of a GPU that calls itself so, in silence."""
    return ARCHITECTURES.get(name) or _like(name)


def _like(name: str) -> Architecture:
    """The least of the generation, whose names differ in the last digit; nothing is assumed of other generations."""
    relatives = [arch for arch in ARCHITECTURES.values() if arch.name[:-1] == name[:-1]]
    relatives = [arch for arch in relatives if arch.family != "gfx9"]  # gfx906 and gfx90a are no relatives
    if not relatives:
        return replace(PORTABLE, name=name, kernels=False)
    return replace(min(relatives, key=lambda arch: (arch.shared_bytes, arch.registers)), name=name)
