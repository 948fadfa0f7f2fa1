"""Tables of tile sizes: `configs/<architecture>/<operation>.json`, written by hand or by `gfxlm tune`.

A table is {"rules": [{"when": {fact: value or [low, high]}, "use": {name: value}}, ...]}. The first rule whose facts
all hold is used; an open end of a range is null, and a rule without `when` always holds. An architecture without a
table takes its family's, and that failing the portable one. What `gfxlm tune` wrote on this machine comes before all,
as long as the table that it was measured against has not changed.
"""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from gfxlm.device.arch import Architecture, architecture
from gfxlm.device.files import cache_folder

CONFIGS = Path(__file__).parent / "configs"

Fact = int | str | bool
Range = list[int | None]
Rule = dict[str, Any]
Measured = dict[frozenset[tuple[str, Fact]], dict[str, Any]]
Asked = tuple[str, tuple[tuple[str, Fact], ...]]

_overrides: ContextVar[dict[str, dict[str, Any]] | None] = ContextVar("overrides", default=None)
_asked: ContextVar[list[Asked] | None] = ContextVar("asked", default=None)


def config(op: str, device: torch.device, **facts: Fact) -> dict[str, Any]:
    """The tuned values of an operation on the device's architecture for these facts of the call."""
    known = tuple(facts.items())
    asked = _asked.get()
    if asked is not None:
        asked.append((op, known))
    overrides = _overrides.get()
    if overrides is not None and op in overrides:
        return dict(overrides[op])
    return dict(_lookup(op, architecture(device), known))


@contextmanager
def override(op: str, values: dict[str, Any]) -> Iterator[None]:
    """Use these values for every call of an operation, whatever its table says."""
    token = _overrides.set({**(_overrides.get() or {}), op: values})
    try:
        yield
    finally:
        _overrides.reset(token)


@contextmanager
def asking() -> Iterator[list[Asked]]:
    """Collect what tables are asked meanwhile: operations and facts."""
    asked: list[Asked] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def shipped_table(op: str, arch: Architecture) -> list[Rule]:
    """The rules that came with the package."""
    for folder in (arch.name, arch.family, "portable"):
        path = CONFIGS / folder / f"{op}.json"
        if path.is_file():
            rules: list[Rule] = json.loads(path.read_text())["rules"]
            return rules
    raise LookupError(f"{op}: there is no table for it")


def fingerprint(rules: list[Rule]) -> str:
    """By what a table that was measured knows the shipped one it was measured against."""
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:12]


def user_configs() -> Path | None:
    """Where `gfxlm tune` writes, a folder for each architecture: GFXLM_CONFIGS, none if that is set and empty."""
    folder = os.environ.get("GFXLM_CONFIGS")
    if folder is None:
        return cache_folder() / "configs"
    return Path(folder).expanduser() if folder else None


def forget() -> None:
    """Read the tables anew when they are next asked."""
    _lookup.cache_clear()
    _table.cache_clear()


@functools.lru_cache(maxsize=4096)
def _lookup(op: str, arch: Architecture, facts: tuple[tuple[str, Fact], ...]) -> dict[str, Any]:
    measured, shipped = _table(op, arch)
    known, key = dict(facts), frozenset(facts)
    if key in measured:
        return measured[key]
    for rule in shipped:
        if all(_holds(wanted, known[name]) for name, wanted in rule.get("when", {}).items()):
            values: dict[str, Any] = rule["use"]
            return values
    raise LookupError(f"{op}: no rule for {known} in the table of {arch.name}")


@functools.lru_cache
def _table(op: str, arch: Architecture) -> tuple[Measured, list[Rule]]:
    """What was measured here, by the facts, and the shipped rules."""
    shipped = shipped_table(op, arch)
    folder = user_configs()
    path = folder and folder / arch.name / f"{op}.json"
    if path is None or not path.is_file():
        return {}, shipped
    try:
        measured = json.loads(path.read_text())
        if measured["against"] == fingerprint(shipped):
            return _by_facts(measured["rules"], shipped), shipped
        reason = "was measured with another version of gfxlm"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"cannot be read ({type(error).__name__}: {error})"
    warnings.warn(f"{path} {reason} and is not used; gfxlm tune writes it anew", stacklevel=2)
    return {}, shipped


def _by_facts(rules: list[Rule], shipped: list[Rule]) -> Measured:
    known = [rule["use"].keys() for rule in shipped]
    for rule in rules:
        if rule["use"].keys() not in known:
            raise ValueError(f"no shipped rule uses {', '.join(rule['use'])}")
    return {frozenset(rule["when"].items()): rule["use"] for rule in rules}


def _holds(wanted: Fact | Range, value: Fact) -> bool:
    if not isinstance(wanted, list):
        return wanted == value
    low, high = wanted
    assert isinstance(value, int)
    return (low is None or low <= value) and (high is None or value <= high)
