"""Bodies of requests: what is known is checked, what is unknown is told, nothing is silently dropped."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

_LONGEST_NAME = 64
_MOST_NAMES = 16


class Body(BaseModel):
    """A JSON object in which a client may send more than is known here."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def check_text(cls, data: Any) -> Any:
        """JSON can write half of a surrogate pair, which is no text and which no tokenizer reads."""
        _check_text(data)
        return data


def _check_text(data: Any) -> None:
    pending = [data]  # no recursion: a client decides how deep it is
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            if not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
                raise ValueError("a text has half of a surrogate pair, such as \\ud83d alone")
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value


def unknown_fields(body: Body) -> list[str]:
    """Names of what a client sent and nobody here reads; of nested bodies as `outer.inner` or `outer[0].inner`."""
    # Clients send back what they got, whose fields are null for the most part, which says nothing.
    names = [name for name, value in (body.model_extra or {}).items() if value is not None]
    for name in type(body).model_fields:
        for place, inner in _bodies(name, getattr(body, name)):
            names += [f"{place}.{unknown}" for unknown in unknown_fields(inner)]
    return names


def _bodies(name: str, value: Any) -> Iterator[tuple[str, Body]]:
    """The bodies in a field, and where they are."""
    if isinstance(value, Body):
        yield name, value
    elif isinstance(value, list):
        yield from ((f"{name}[{i}]", item) for i, item in enumerate(value) if isinstance(item, Body))


def ignored_header(body: Body) -> dict[str, str]:
    """The response header that says which fields were ignored; none where all are known."""
    names = unknown_fields(body)
    if not names:
        return {}
    shown = ", ".join(name[:_LONGEST_NAME] for name in names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    # A client's own words, in a header: printable ASCII, and nothing that ends the quoted text.
    safe = "".join(sign if sign.isascii() and sign.isprintable() and sign not in '"\\' else "?" for sign in shown)
    return {"Warning": f'299 gfxlm "ignored: {safe}{more}"'}
