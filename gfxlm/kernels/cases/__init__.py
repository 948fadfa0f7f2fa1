"""The shapes that every kernel is tried on."""

import functools
import importlib
import pkgutil

from gfxlm.errors import UserError
from gfxlm.kernels.case import Case


def topics() -> list[str]:
    """The modules of cases there are: one for each kind of work."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def catalogue(ops: list[str] | None = None) -> dict[str, list[Case]]:
    """All cases by topic, or those whose topic, operation or beginning of a name is among `ops`.

    UserError for a word that selects none.
    """
    found = {topic: _cases(topic) for topic in topics()}
    if not ops:
        return found
    for op in ops:
        if not any(_selects(op, topic, case) for topic, cases in found.items() for case in cases):
            known = sorted({*found, *(case.name.split("/")[0] for cases in found.values() for case in cases)})
            raise UserError(f"no case is called {op!r}; known are {', '.join(known)}")
    chosen = {
        topic: [case for case in cases if any(_selects(op, topic, case) for op in ops)]
        for topic, cases in found.items()
    }
    return {topic: cases for topic, cases in chosen.items() if cases}


@functools.lru_cache
def _cases(topic: str) -> list[Case]:
    cases: list[Case] = importlib.import_module(f"{__name__}.{topic}").cases()
    return cases


def _selects(op: str, topic: str, case: Case) -> bool:
    return op == topic or f"{case.name}/".startswith(f"{op}/")
