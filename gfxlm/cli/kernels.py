"""`gfxlm kernels`: what the kernels are as machine code for an AMD GPU."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gfxlm.cli.gpu import chosen, require_triton
from gfxlm.cli.progress import progress_bar
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.device.arch import Architecture

_COLUMNS = {
    "kernel": "kernel",
    "num_warps": "warps",
    "vgprs": "VGPRs",
    "sgprs": "SGPRs",
    "spills": "spills",
    "lds": "LDS",
    "occupancy": "waves/SIMD",
    "wide_loads": "16-byte loads",
    "matrix": "matrix instr.",
}


def kernels(
    arch: Annotated[str | None, typer.Option(help="The architecture. Default: this machine's GPU.")] = None,
    op: Annotated[
        list[str] | None, typer.Option(help="A kind of work, or the beginning of a case's name. Default: all.")
    ] = None,
    compile_now: Annotated[
        bool, typer.Option("--compile", help="Compile here and now; else the record that came with gfxlm is shown.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show registers, local memory, loads and matrix instructions of the kernels' machine code for an AMD GPU.

    Below a case: vector instructions for each multiplication of a weight, and the share of the time in which the
    architecture's example part reads the case's bytes that issuing them takes.
    """
    [found] = chosen([arch] if arch else None)
    if found.vendor != "amd":
        raise UserError(f"{found.name}: machine code is counted for AMD only; name an AMD architecture with --arch")
    cases = _compiled(found, op) if compile_now else _recorded(found, op)
    if as_json:
        judged = {name: entry | _judged(found, entry) for name, entry in cases.items()}
        print(json.dumps({"arch": found.name, "example": found.example, "cases": judged}, indent=1))
    else:
        print("\n".join(_lines(found, cases)))


def _recorded(arch: "Architecture", ops: list[str] | None) -> dict[str, Any]:
    from gfxlm.kernels.manifest import read

    cases: dict[str, Any] = read(arch.name)["cases"]
    if not cases:
        raise UserError(f"{arch.name}: there is no record of it; --compile makes one")
    found = {
        name: entry
        for name, entry in cases.items()
        if not ops or any(op == entry["topic"] or f"{name}/".startswith(f"{op}/") for op in ops)
    }
    if not found:
        known = sorted({entry["topic"] for entry in cases.values()} | {name.split("/")[0] for name in cases})
        raise UserError(f"no case is called {' or '.join(map(repr, ops or []))}; known are {', '.join(known)}")
    return found


def _compiled(arch: "Architecture", ops: list[str] | None) -> dict[str, Any]:
    require_triton()
    from gfxlm.kernels.check import entry_of
    from gfxlm.kernels.codegen import compile_all, jobs

    with progress_bar("compiling") as progress:
        done = list(compile_all(jobs([arch], ops), None, progress))
    for failed in [one for one in done if one.error]:
        raise UserError(f"{failed.job.case}: {failed.error}")
    return {one.job.case: entry_of(one) for one in sorted(done, key=lambda one: one.job.case)}


def _lines(arch: "Architecture", cases: dict[str, Any]) -> list[str]:
    width = max(len(row["kernel"]) for entry in cases.values() for row in entry["launches"]) + 2
    head = f"{'':<{width}}" + "".join(f"{title:>{_width(title)}}" for title in list(_COLUMNS.values())[1:])
    lines = [f"{arch.name}, wave {arch.wave}; shares are of a {arch.example}, {arch.bandwidth:.0f} GB/s", head]
    for name, entry in cases.items():
        judged = _judged(arch, entry)
        lines.append(name + _arithmetic(judged))
        lines += [_row(row, width) for row in entry["launches"]]
        lines += [f"  fails: {line}" for line in judged["failures"]]
    return lines


def _judged(arch: "Architecture", entry: dict[str, Any]) -> dict[str, Any]:
    from gfxlm.kernels.gates import failures, per_weight, vector_share

    shares = {"per_weight": per_weight(entry, arch), "vector_share": vector_share(entry, arch)}
    return {**shares, "failures": failures(entry, arch)}


def _arithmetic(judged: dict[str, Any]) -> str:
    if judged["per_weight"] is None:
        return ""
    return f": {judged['per_weight']:.2f} vector instructions a weight, {judged['vector_share']:.0%} of the bytes' time"


def _row(row: dict[str, Any], width: int) -> str:
    cells = "".join(f"{row[key]:>{_width(title)}}" for key, title in list(_COLUMNS.items())[1:])
    return f"  {row['kernel']:<{width - 2}}{cells}"


def _width(title: str) -> int:
    return max(len(title), 6) + 2  # LDS has up to six digits
