"""What a check found."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Level = Literal["ok", "warning", "error"]
_Subject = TypeVar("_Subject")


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about a machine, whether it is as it should be, and what to do if it is not.

    An error means that generation would be wrong or impossible on this device. `data` are its numbers, for programs.
    """

    name: str
    value: str
    level: Level = "ok"
    fix: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def examined(check: Callable[[_Subject], Iterable[Finding]], subject: _Subject) -> Iterator[Finding]:
    """What a check finds; if it raises, that."""
    try:
        yield from check(subject)
    except Exception as error:  # a broken driver raises whatever it likes
        reason = " ".join(str(error).split())[:300]
        name = check.__name__.replace("_", " ")
        yield Finding(name, f"failed with {type(error).__name__}: {reason}", "warning", "please report this")
