"""What the compiler's output for AMD says about a kernel: registers, local memory, loads, matrix instructions."""

import re
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from triton.compiler import CompiledKernel

from gfxlm.device.arch import Architecture
from gfxlm.kernels.launch import Specialized
from gfxlm.kernels.record import argument_words
from gfxlm.kernels.source import source_hash
from gfxlm.kernels.walk import walk

_WIDE = re.compile(r"(?:global|buffer|flat)_load_(?:b128|dwordx4)\b")
_MATRIX = re.compile(r"\bv_(?:wmma|mfma|swmmac|smfmac)_")
_DOT = re.compile(r"tt\.dot(?:_scaled)? .*?: tensor<[\dx]+x(\w+)")


@dataclass(frozen=True, slots=True)
class Counts:
    """One launch on one architecture. Registers are a lane's, memory is in bytes."""

    kernel: str
    key: str  # of signature, constants and options
    source: str  # hash of the kernel's source
    num_warps: int
    vgprs: int
    sgprs: int
    spills: int  # vector registers in scratch memory
    scalar_spills: int  # scalar registers in lanes of vector ones, or in scratch memory
    lds: int
    scratch: int
    occupancy: int  # waves on a SIMD
    wide_loads: int  # places with a load of 16 bytes a lane
    matrix: int  # places with a matrix instruction
    dots: str  # element types that tl.dot multiplies, "" where there is none
    vector: int | None  # vector instructions that a lane executes; None where not asked for or not known
    programs: int

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def identity(code: Specialized) -> tuple[str, str, str]:
    """What tells this machine code from others: the kernel's name, `key` and `source` of its counts."""
    return code.launch.kernel.__name__, code.key, source_hash(code.launch.kernel)


def count(code: Specialized, compiled: CompiledKernel, arch: Architecture, *, walked: bool) -> Counts:
    """Read the counts out of what was compiled for an AMD architecture; `walked` to count what is executed, too."""
    text = compiled.asm["amdgcn"]
    body = text[: text.find("\n.Lfunc_end0:")]
    kernel, key, source = identity(code)
    num_warps, vgprs, lds = compiled.metadata.num_warps, _field(text, "vgpr_count"), compiled.metadata.shared
    executed = walk(text, argument_words(code.launch, code.signature)) if walked else None
    return Counts(
        kernel=kernel,
        key=key,
        source=source,
        num_warps=num_warps,
        vgprs=vgprs,
        sgprs=_field(text, "sgpr_count"),
        spills=_field(text, "vgpr_spill_count"),
        scalar_spills=_field(text, "sgpr_spill_count"),
        lds=lds,
        scratch=_field(text, "private_segment_fixed_size"),
        occupancy=arch.occupancy(vgprs, lds, num_warps),
        wide_loads=len(_WIDE.findall(body)),
        matrix=len(_MATRIX.findall(body)),
        dots=" ".join(sorted(set(_DOT.findall(compiled.asm["ttir"])))),
        vector=executed.vector if executed is not None and executed.exact else None,
        programs=prod(code.launch.grid),
    )


def _field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    return int(found[1]) if found else 0
