"""Tools that a model may call, and what a model's text says about it."""

import json
import re
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gfxlm.server.incremental import Malformed, Source

Schema = Mapping[str, Any]

_SURROGATE = re.compile("[\ud800-\udfff]")
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function: its name, what it is for, the JSON schema of its arguments, whether they must follow it."""

    name: str
    description: str | None = None
    parameters: Schema = field(default_factory=dict)
    strict: bool = False

    @property
    def openai(self) -> dict[str, Any]:
        """As chat templates want to see it."""
        description = {} if self.description is None else {"description": self.description}
        parameters = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": {"name": self.name, **description, "parameters": dict(parameters)}}

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schema of each argument."""
        properties: Mapping[str, Any] = self.parameters.get("properties") or {}
        return properties

    @property
    def open_ended(self) -> bool:
        """Whether it takes arguments that are not declared."""
        undeclared = bool(self.parameters) and "properties" not in self.parameters
        return bool(self.parameters.get("additionalProperties", undeclared))

    def property(self, name: str) -> Schema:
        """The schema of one argument, with the definitions that it refers to; {} for one that is not declared."""
        schema = self.properties.get(name)
        if not isinstance(schema, Mapping):
            return {}
        shared = {key: self.parameters[key] for key in ("$defs", "definitions") if key in self.parameters}
        return {**shared, **schema}

    def arguments(self) -> dict[str, Any]:
        """The schema that a grammar holds arguments to: an object on one line, with the declared arguments only."""
        schema = on_one_line({"type": "object", "properties": {}, **self.parameters})
        if not self.open_ended and not {"anyOf", "oneOf", "allOf", "$ref"} & schema.keys():
            schema.setdefault("additionalProperties", False)
        return schema


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of the tool `name` begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments' JSON text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """Nothing more comes for this call."""


ToolEvent = Content | CallBegin | CallArguments | CallEnd
Parse = Iterator[ToolEvent | None]
Reading = Generator[ToolEvent | None, None, None]


def on_one_line(schema: Schema) -> dict[str, Any]:
    """The schema, with the wish for JSON on one line."""
    return {**schema, "x-guidance": _ONE_LINE}


def types(schema: Schema, root: Schema | None = None, depth: int = 8) -> set[str]:
    """The JSON types that a schema allows; all that could be told apart, none where it does not say."""
    root = schema if root is None else root
    if depth == 0:
        return set()
    if isinstance(reference := schema.get("$ref"), str):
        return types(_resolved(reference, root), root, depth - 1)
    if isinstance(kind := schema.get("type"), str):
        return {kind}
    if isinstance(kind, Sequence):
        return {str(one) for one in kind}
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    found = {_type_of(value) for value in values}
    for key in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else ():
            found |= types(branch, root, depth - 1) if isinstance(branch, Mapping) else set()
    return found


def fits(value: object, allowed: set[str]) -> bool:
    """Whether a value has one of the JSON types; any has where none is known."""
    kind = _type_of(value)
    if kind == "integer" or (isinstance(value, float) and value.is_integer()):
        return not allowed or bool(allowed & {"integer", "number"})
    return not allowed or kind in allowed


def line(value: object) -> str:
    """JSON on one line, as models write it. Raises ValueError for a number that JSON does not have."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair cannot be sent, but for its escape.
    return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(value)


def _resolved(reference: str, root: Schema) -> Schema:
    found: Any = root
    for step in reference.removeprefix("#/").split("/"):
        found = found.get(step.replace("~1", "/").replace("~0", "~"), {}) if isinstance(found, Mapping) else {}
    return found if isinstance(found, Mapping) else {}


def _type_of(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", list: "array"}
    return names.get(type(value), "object")


def new_call_id() -> str:
    """What tells a call from others, in OpenAI's manner."""
    return f"call_{secrets.token_hex(12)}"


def content(source: Source, tags: Sequence[str]) -> Generator[ToolEvent | None, None, str]:
    """Pass content on up to the first of the tags, which is not read, nor the white space before it."""
    flow = source.flow(*tags)
    while True:
        try:
            text = next(flow)
        except StopIteration as end:
            return str(end.value)
        yield None if text is None else Content(text)


def content_and_calls(source: Source, tags: Sequence[str], read: Callable[[str], Reading]) -> Parse:
    """Content, and what `read` makes of each tag that comes; where it raises Malformed, that is content, too.

    White space around calls belongs to neither.
    """
    called = False
    while tag := (yield from content(source, tags)):
        try:
            yield from read(tag)
            called = True
        except Malformed:
            yield from given_back(source)
    if not called:
        source.position = len(source.text)
        yield from given_back(source)


def given_back(source: Source) -> Iterator[Content]:
    """What has been read is content after all."""
    if text := source.commit():
        yield Content(text)
