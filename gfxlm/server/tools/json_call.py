"""One call as a JSON object: {"name": ..., "arguments": {...}}, its arguments passed on as they come."""

import json
import re
from collections.abc import Collection

from gfxlm.server.incremental import Malformed, Nesting, Source, Wait
from gfxlm.server.tools.tool import CallArguments, CallBegin, CallEnd, Reading

_ARGUMENTS = ("arguments", "parameters")
_ALSO = ("type", "id")  # members that say nothing new
_END_OR_ESCAPE = re.compile(r'["\\]')


def json_call(source: Source, names: Collection[str] | None = None) -> Reading:
    """Read one call. Raises Malformed for anything else, or for a name that is not in `names`.

    What follows complete arguments may be wrong: models forget the last brace.
    """
    yield from source.expect("{")
    name: str | None = None
    arguments: str | None = None
    while (yield from source.skip_space(also=",")) != "}":
        key = yield from string(source)
        yield from source.skip_space()
        yield from source.expect(":")
        first = yield from source.skip_space()
        if key == "name":
            name = yield from string(source)
            if names is not None and name not in names:
                raise Malformed
        elif key in _ARGUMENTS and first == "{" and name is not None:
            yield CallBegin(name)
            yield from streamed_object(source)
            yield CallEnd()
            yield from _tail(source)
            return
        elif key in _ARGUMENTS:
            arguments = yield from _arguments(source, first)
        elif key in _ALSO:
            yield from string(source)
        else:
            raise Malformed
    source.position += 1
    if name is None:
        raise Malformed
    source.commit()
    yield CallBegin(name)
    yield CallArguments(arguments or "{}")
    yield CallEnd()


def streamed_object(source: Source) -> Reading:
    """Read an object from its first brace to the brace that closes it, and pass it on as it comes.

    Only strings and brackets are looked at. Where the text ends before, so do the arguments.
    """
    source.commit()
    nesting = Nesting()
    while True:
        end = nesting.end(source.text)
        source.position = end or len(source.text)
        if source.text:
            yield CallArguments(source.commit())
        if end or source.ended:
            return
        yield None


def string(source: Source) -> Wait[str]:
    """Read a JSON string."""
    begin = source.position
    yield from source.expect('"')
    position = source.position
    while (found := _END_OR_ESCAPE.search(source.text, position)) is None or found[0] != '"':
        if found is not None and found.end() < len(source.text):
            position = found.end() + 1
        else:
            position = found.start() if found is not None else len(source.text)
            yield from source.more()
    source.position = found.end()
    try:
        text: str = json.loads(source.text[begin : source.position], strict=False)
        text.encode()  # half a surrogate pair is not text
    except ValueError as error:
        raise Malformed from error
    return text


def _arguments(source: Source, first: str) -> Wait[str]:
    """Arguments that cannot be passed on yet: they come before the name, or as JSON in a string."""
    if first == '"':
        text = yield from string(source)
    elif first == "{":
        text = yield from source.nested('"')
    elif (yield from source.starts_with("null")):
        source.position += len("null")
        return "{}"
    else:
        raise Malformed
    try:
        whole = isinstance(json.loads(text or "{}", strict=False), dict)
    except ValueError as error:
        raise Malformed from error
    if not whole:
        raise Malformed
    return text or "{}"


def _tail(source: Source) -> Reading:
    """Read what comes behind the arguments, if it is what belongs there."""
    try:
        while (yield from source.skip_space(also=",")) == '"':
            yield from string(source)
            yield from source.skip_space()
            yield from source.expect(":")
            yield from source.skip_space()
            yield from string(source)
        yield from source.expect("}")
        source.commit()
    except Malformed:
        source.rewind()
