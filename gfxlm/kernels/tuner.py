"""Find the fastest values of an operation's table on the GPU that is here.

What may be tried stands in `configs/<operation>.space.json`: {name: [values]}, the names of nested values with a dot,
as in "options.num_warps". One name after the other is varied, the others staying at the best so far, twice over. A
candidate counts that compiles, gives the numbers that the table's own values give, and can be captured in a graph.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfxlm.device.arch import architecture
from gfxlm.device.files import write_whole
from gfxlm.device.timing import microseconds, rotated
from gfxlm.errors import UserError
from gfxlm.kernels import tuning
from gfxlm.kernels.case import Call, Case
from gfxlm.kernels.cases import catalogue
from gfxlm.kernels.tuning import Asked

Values = dict[str, Any]
Facts = tuple[tuple[str, tuning.Fact], ...]
_PASSES = 2
_GAIN = 0.98  # below this share of the best time so far, a candidate is faster and not merely luckier


@dataclass(frozen=True, slots=True)
class Tuned:
    """A call of an operation: the shipped table's values and time (µs), and the best that were found."""

    op: str
    case: str
    facts: Facts
    before: Values
    before_us: float
    best: Values
    best_us: float


def tunable() -> list[str]:
    """The operations that say what may be tried."""
    return sorted(path.name.removesuffix(".space.json") for path in tuning.CONFIGS.glob("*.space.json"))


def space(op: str) -> dict[str, list[Any]]:
    """What may be tried for an operation. UserError if it does not say."""
    path = tuning.CONFIGS / f"{op}.space.json"
    if not path.is_file():
        raise UserError(f"operation {op!r} cannot be tuned; those that can are {', '.join(tunable())}")
    values: dict[str, list[Any]] = json.loads(path.read_text())
    return values


def asked_by(case: Case, device: torch.device) -> list[Asked]:
    """Which tables one call of the case asks on the device, and with what facts. Runs nothing."""
    from gfxlm.kernels.launch import recording

    with torch.inference_mode(), recording(architecture(device)), tuning.asking() as asked:
        case.make(torch.device("meta"))()
    return list(dict.fromkeys(asked))


def tune(op: str, device: torch.device) -> Iterator[Tuned]:
    """Tune an operation for every case that asks its table, one result for each set of facts."""
    candidates, seen = space(op), set[Facts]()
    for cases in catalogue().values():
        for case in cases:
            for asked, facts in asked_by(case, device):
                if asked == op and facts not in seen:
                    seen.add(facts)
                    with torch.inference_mode():
                        yield _tune_case(op, case, facts, candidates, device)


def _tune_case(op: str, case: Case, facts: Facts, candidates: dict[str, list[Any]], device: torch.device) -> Tuned:
    calls = rotated(case.make, device)
    before = tuning.config(op, device, **dict(facts))
    expected = _numbers(case, device)
    before_us = microseconds(calls)
    best, best_us = before, before_us
    for _ in range(_PASSES):
        for name in [name for name in candidates if _has(before, name)]:
            for value in candidates[name]:
                values = _with(best, name, value)
                if values != best and (time := _measure(op, values, case, calls, expected)) is not None:
                    best, best_us = (values, time) if time < _GAIN * best_us else (best, best_us)
    return Tuned(op, case.name, facts, before, before_us, best, best_us)


def _has(values: Values, name: str) -> bool:
    outer, _, inner = name.partition(".")
    return outer in values and (not inner or _has(values[outer], inner))


def _with(values: Values, name: str, value: Any) -> Values:
    outer, _, inner = name.partition(".")
    return {**values, outer: _with(values[outer], inner, value) if inner else value}


def _measure(op: str, values: Values, case: Case, calls: list[Call], expected: list[Tensor]) -> float | None:
    """Time of a call with these values in µs; None where they do not compile or give other numbers."""
    with tuning.override(op, values):
        try:
            found = _numbers(case, expected[0].device)
            if not all(_same(a, b) for a, b in zip(found, expected, strict=True)):
                return None
            return microseconds(calls)
        except Exception:  # the compiler's and the driver's own are of many kinds
            torch.cuda.synchronize()
            return None


def _numbers(case: Case, device: torch.device) -> list[Tensor]:
    """What the case's call gives for inputs that are the same each time, and fresh: some calls write into theirs."""
    torch.manual_seed(0)
    return _tensors(case.make(device)())


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.clone()]
    return [tensor for part in result for tensor in _tensors(part)] if isinstance(result, list | tuple) else []


def _same(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Sums in another order, and then one rounding.
    bound = 4 * torch.finfo(a.dtype).eps * b.float().abs().nan_to_num().amax() if b.numel() else 0.0
    return torch.allclose(a.float(), b.float(), rtol=0.0, atol=float(bound), equal_nan=True)


def table(results: list[Tuned], op: str, device: torch.device) -> dict[str, Any]:
    """The table to write: the measured facts' own rules. What they do not cover stays with the shipped table."""
    rules = [{"when": dict(result.facts), "use": result.best} for result in results]
    shipped = tuning.shipped_table(op, architecture(device))
    return {"against": tuning.fingerprint(shipped), "rules": rules}


def write(folder: Path, op: str, device: torch.device, results: list[Tuned]) -> Path:
    """Write `<folder>/<architecture>/<op>.json`, one rule a line, whole or not at all."""
    found = table(results, op, device)
    path = folder / architecture(device).name / f"{op}.json"
    rules = ",\n    ".join(json.dumps(rule) for rule in found["rules"])
    write_whole(path, f'{{"against": "{found["against"]}", "rules": [\n    {rules}\n]}}\n')
    tuning.forget()
    return path
