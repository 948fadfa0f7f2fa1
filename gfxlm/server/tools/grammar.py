"""Grammars that hold a model to calls of its tools, in llguidance's dialect of Lark."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Symbol = Callable[[str], str]  # the Lark symbol for a tag: its token where it is one, else its text


def literal(text: str) -> str:
    """Just this text."""
    return json.dumps(text)


def json_of(schema: Mapping[str, Any]) -> str:
    """JSON that follows the schema."""
    return f"%json {json.dumps(schema)}"


def any_of(rule: str, bodies: Iterable[str]) -> str:
    """The rule that is one of the bodies, each of which becomes a rule of its own: %json may stand nowhere else."""
    lines = [f"{rule}_{i}: {body}" for i, body in enumerate(bodies)]
    return "\n".join([f"{rule}: {' | '.join(f'{rule}_{i}' for i in range(len(lines)))}", *lines])


def repeated(rule: str, item: str, separator: str, parallel: bool) -> str:
    """The rule that is one item, or with `parallel` any number of them."""
    return f"{rule}: {item}" + (f" ({separator} {item})*" if parallel else "")
