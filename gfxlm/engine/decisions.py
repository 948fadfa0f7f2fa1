"""All that is decided by architecture, without the architecture being there."""

import warnings
from typing import Any

import torch

from gfxlm.device.arch import ARCHITECTURES, Architecture, assume
from gfxlm.device.arena import unified
from gfxlm.device.gemm import ROWS, library, order
from gfxlm.device.versions import triton_there
from gfxlm.kernels.tuning import CONFIGS, asking, config

Rows = dict[str, str]
_META = torch.device("meta")
# (N, K) of Qwen3-8B's and Qwen3-Coder-Next's products, and of an expert's.
_SHAPES = ((6144, 4096), (24576, 4096), (12288, 2048), (512, 2048))
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def decisions(arch: Architecture) -> dict[str, Rows]:
    """What is decided on an architecture: its facts, memory, BLAS, regimes, tables, and the tiles of headline cases.

    Tiles are what real launches ask for, which takes Triton; without, there are none.
    """
    with assume(arch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {"facts": _facts(arch), "memory": _memory(), "BLAS": _blas(arch)}
        if arch.kernels:
            found |= {"regimes": _regimes(), "tables": _tables(arch)}
            if triton_there():
                found["tiles"] = _tiles(arch)
    return found


def _facts(arch: Architecture) -> Rows:
    rows = {
        "like": ARCHITECTURES[arch.name].example if arch.name in ARCHITECTURES else "",
        "wave": f"{arch.wave} lanes",
        "matrix units": arch.matrix,
        "shared memory": f"{arch.shared_bytes >> 10} KiB a program",
        "registers": f"{arch.registers} a SIMD, in lots of {arch.register_lot}" if arch.vendor == "amd" else "",
        "cache line": f"{arch.cache_line} bytes",
        "kind": "integrated" if arch.integrated else "discrete",
        "kernels": "ours, by Triton" if arch.kernels else "none: plain torch",
    }
    if arch.stride_cliff:
        rows["stride cliff"] = f"rows a multiple of {arch.stride_cliff} bytes apart are read slowly"
    if arch.bandwidth:
        rows["read bandwidth"] = f"{arch.bandwidth:.0f} GB/s"
    if arch.matrix_rate:
        rows["matrix rate"] = f"{arch.matrix_rate / 1e12:.1f} TFLOP/s in bfloat16"
    return {key: value for key, value in rows.items() if value}


def _memory() -> Rows:
    arena = (
        "arena: hipExtMallocWithFlags (fine-grained), then hipMallocManaged" if unified(_META) else "torch's allocator"
    )
    return {"weights": arena, "caches and work": "torch's allocator"}


def _blas(arch: Architecture) -> Rows:
    rows = {"order": ", ".join(order(arch))}
    for dtype in _TYPES:
        chosen = {limit: library(_META, dtype, limit) for limit in ROWS}
        rows[str(dtype).removeprefix("torch.")] = _merged(chosen)
    return rows


def _merged(chosen: dict[int, str]) -> str:
    """Libraries by the number of rows, or the one that all have."""
    if len(set(chosen.values())) == 1:
        return next(iter(chosen.values()))
    return ", ".join(f"{found} to {rows} rows" for rows, found in chosen.items())


def _regimes() -> Rows:
    """Up to how many rows which kernel multiplies; the rest is `wide`."""
    rows = {}
    for n, k in _SHAPES:
        limits = config("linear", _META, n=n, k=k, bits=4, skinny=True)
        parts = [f"matvec to {limits['matvec_rows']} rows"]
        if limits["skinny_rows"] > limits["matvec_rows"]:
            parts.append(f"skinny to {limits['skinny_rows']}")
        rows[f"{n}x{k}"] = ", ".join([*parts, "then wide"])
    for experts, top_k in ((128, 8), (512, 10)):
        gathered = [t for t in range(1, 257) if config("moe", _META, tokens=t, experts=experts, top_k=top_k)["decode"]]
        rows[f"{experts} experts, {top_k} each"] = f"gathered to {max(gathered, default=0)} tokens, then sorted"
    rows["pages"] = f"{config('pages', _META)['page_size']} positions"
    return rows


def _tables(arch: Architecture) -> Rows:
    """Whose table each operation uses."""
    operations = sorted(path.stem for path in (CONFIGS / "portable").glob("*.json"))
    folders = (arch.name, arch.family, "portable")
    used: dict[str, list[str]] = {}
    for operation in operations:
        folder = next(folder for folder in folders if (CONFIGS / folder / f"{operation}.json").is_file())
        used.setdefault(folder, []).append(operation)
    return {folder: ", ".join(names) for folder, names in used.items()}


def _tiles(arch: Architecture) -> Rows:
    """What the tables answer to the launches of each headline case."""
    from gfxlm.kernels.cases import catalogue
    from gfxlm.kernels.record import record

    rows = {}
    for cases in catalogue(None).values():
        for case in cases:
            if case.headline:
                with asking() as asked:
                    record(case, arch)
                values = {operation: config(operation, _META, **dict(known)) for operation, known in asked}
                rows[case.name] = "; ".join(f"{operation} {_shown(found)}" for operation, found in values.items())
    return rows


def _shown(values: dict[str, Any]) -> str:
    parts = []
    for name, value in values.items():
        if not isinstance(value, dict):
            parts.append(f"{name.lower()} {value}")
        else:
            parts.append(_shown(value) if name == "options" else f"{name} ({_shown(value)})")
    return ", ".join(parts)
