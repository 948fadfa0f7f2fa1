"""`gfxlm doctor`: what this machine is, what is wrong with it, and what to do about that."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gfxlm.device.finding import Finding

Sections = dict[str, dict[str, str]]

_MARKS = {"ok": " ", "warning": "!", "error": "✗"}
_WIDTH = 18


def doctor(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda (ROCm too), cuda:1. Default: the discrete GPU with the most units.")
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(help="Instead, list all decisions on this architecture (may be repeated); all: on every AMD one."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure no speed, try no BLAS library, check bfloat16 alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine: devices, driver, versions, memory, speed, kernels, and whether numbers are right.

    A line that begins with ! is a warning, one with ✗ an error; what to do stands below it. The exit code is 1 if there
    is an error: generated text would be wrong. With --arch: tables, tiles, memory and BLAS libraries as on that
    architecture, which need not be there; where GFXLM_ASSUME_ARCH is set, they follow the findings.
    """
    if arch:
        _print_decisions(arch, as_json)
        return
    from gfxlm.device.select import pick_device
    from gfxlm.engine.doctor import diagnose

    findings = diagnose(pick_device(device), quick=quick)
    failed = _print_json(findings) if as_json else _print_text(findings)
    if failed:
        raise typer.Exit(1)


def _print_text(findings: "Iterable[tuple[str, Finding]]") -> bool:
    """Print each finding as it comes; whether one is an error."""
    counts = dict.fromkeys(_MARKS, 0)
    previous = ""
    for section, finding in findings:
        if section != previous:
            print(section)
            previous = section
        counts[finding.level] += 1
        print(f"{_MARKS[finding.level]} {finding.name:<{_WIDTH}} {finding.value}", flush=True)
        if finding.fix:
            print(f"  {'':<{_WIDTH}} -> {finding.fix}", flush=True)
    errors, warnings = counts["error"], counts["warning"]
    for name, sections in _assumed().items():
        _print_sections(name, sections)
    print(f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}")
    return errors > 0


def _print_json(findings: "Iterable[tuple[str, Finding]]") -> bool:
    from gfxlm import __version__

    sections: dict[str, list[dict[str, object]]] = {}
    for section, finding in findings:
        sections.setdefault(section, []).append(asdict(finding))
    every = [finding for found in sections.values() for finding in found]
    failed = any(finding["level"] == "error" for finding in every)
    print(json.dumps({"gfxlm": __version__, "ok": not failed, **sections, "decisions": _assumed()}, indent=1))
    return failed


def _counted(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _assumed() -> dict[str, Sections]:
    """Decisions on the architecture that GFXLM_ASSUME_ARCH names, if it names one."""
    from gfxlm.device.arch import named
    from gfxlm.engine.decisions import decisions

    name = os.environ.get("GFXLM_ASSUME_ARCH")
    return {name: decisions(named(name))} if name else {}


def _print_decisions(names: list[str], as_json: bool) -> None:
    from gfxlm.device.arch import AMD, named
    from gfxlm.engine.decisions import decisions

    wanted = [found for name in names for found in (AMD if name == "all" else (name,))]
    found = {name: decisions(named(name)) for name in wanted}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, sections in found.items():
        _print_sections(name, sections)


def _print_sections(name: str, sections: Sections) -> None:
    print(name)
    for section, rows in sections.items():
        width = max(map(len, rows), default=0) + 2
        print(f" {section}")
        for key, value in rows.items():
            print(f"  {key:<{width}}{value}")
