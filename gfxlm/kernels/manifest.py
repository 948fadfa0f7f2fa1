"""The record of what every kernel compiled to: `manifest/<architecture>.json`, written by `make codegen`.

{"triton": version, "cases": {name: {"topic", "nbytes", "flops", "launches": [counts, ...]}}}. A launch's counts
(`assembly.Counts`) begin with the kernel's name, a key of all that is compiled in, and a hash of its source. As long as
these three are what they were, so is the machine code. Reading the record needs no Triton.
"""

import json
from pathlib import Path
from typing import Any

from gfxlm.device.arch import AMD, named
from gfxlm.device.files import write_whole

FOLDER = Path(__file__).parent / "manifest"
TARGETS = tuple(name for name in AMD if named(name).kernels)
HEADLINE_TARGETS = ("gfx942", "gfx1100", "gfx1151", "gfx1201")
Entry = dict[str, Any]


def read(arch: str, folder: Path = FOLDER) -> Entry:
    """An architecture's record, without cases where there is no file."""
    path = folder / f"{arch}.json"
    if not path.is_file():
        return {"triton": "", "cases": {}}
    entry: Entry = json.loads(path.read_text())
    return entry


def write(arch: str, record: Entry, folder: Path = FOLDER) -> None:
    """Write an architecture's record, one launch a line, whole or not at all."""
    cases = []
    for name, entry in sorted(record["cases"].items()):
        rows = ",\n   ".join(json.dumps(row) for row in entry["launches"])
        head = json.dumps({key: value for key, value in entry.items() if key != "launches"})
        cases.append(f' {json.dumps(name)}: {head[:-1]}, "launches": [\n   {rows}]}}')
    text = f'{{"triton": {json.dumps(record["triton"])}, "cases": {{\n' + ",\n".join(cases) + "\n}}\n"
    write_whole(folder / f"{arch}.json", text)
