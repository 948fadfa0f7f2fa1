"""Tables of tile sizes: `configs/<architecture>/<operation>.json`, written by hand or by `gfxlm tune`.

A table is {"rules": [{"when": {fact: value or [low, high]}, "use": {name: value}}, ...]}. The first rule whose facts
all hold is used; an open end of a range is null, and a rule without `when` always holds. An architecture without a
table takes its family's, and that failing the portable one.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

from gfxlm.device.arch import Architecture, architecture

_CONFIGS = Path(__file__).parent / "configs"

Fact = int | str | bool
Range = list[int | None]


def config(op: str, device: torch.device, **facts: Fact) -> dict[str, Any]:
    """The tuned values of an operation on the device's architecture for these facts of the call."""
    return _lookup(op, architecture(device), tuple(facts.items()))


@functools.lru_cache(maxsize=4096)
def _lookup(op: str, arch: Architecture, facts: tuple[tuple[str, Fact], ...]) -> dict[str, Any]:
    known = dict(facts)
    for rule in _table(op, arch):
        if all(_holds(wanted, known[name]) for name, wanted in rule.get("when", {}).items()):
            return dict(rule["use"])
    raise LookupError(f"{op}: no rule for {known} in the table of {arch.name}")


@functools.lru_cache
def _table(op: str, arch: Architecture) -> list[dict[str, Any]]:
    for folder in (arch.name, arch.family, "portable"):
        path = _CONFIGS / folder / f"{op}.json"
        if path.is_file():
            rules: list[dict[str, Any]] = json.loads(path.read_text())["rules"]
            return rules
    raise LookupError(f"{op}: there is no table for it")


def _holds(wanted: Fact | Range, value: Fact) -> bool:
    if not isinstance(wanted, list):
        return wanted == value
    low, high = wanted
    assert isinstance(value, int)
    return (low is None or low <= value) and (high is None or value <= high)
