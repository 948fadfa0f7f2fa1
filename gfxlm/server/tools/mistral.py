"""Calls after [TOOL_CALLS]: a list of objects, or, in newer models, name[ARGS]{...} for each."""

import re
import secrets
import string
from collections.abc import Mapping, Sequence

from gfxlm.server.incremental import Malformed, Source
from gfxlm.server.tools.grammar import Symbol, any_of, json_of, literal, repeated
from gfxlm.server.tools.json_call import json_call, streamed_object
from gfxlm.server.tools.qwen import json_body
from gfxlm.server.tools.tool import CallBegin, CallEnd, Parse, Reading, Tool, content_and_calls

_OPEN, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_LETTERS = string.ascii_letters + string.digits
_NAME = re.compile(r"[\w.:/-]{1,256}\s*")


class Mistral:
    """Both forms are read; the chat template says which one the model writes: name[ARGS]{...}, or a list."""

    name = "mistral"
    trigger = _OPEN

    def __init__(self, template: str) -> None:
        self._headers, self._ids = _ARGUMENTS in template, _ID in template

    def parse(self, source: Source, tools: Mapping[str, Tool]) -> Parse:
        """Content and calls."""
        return content_and_calls(source, (_OPEN,), lambda _: _calls(source))

    def call_id(self) -> str:
        """A new one: the templates take back nothing but nine letters and digits."""
        return "".join(secrets.choice(_LETTERS) for _ in range(9))

    def rules(self, tools: Sequence[Tool], symbol: Symbol, *, parallel: bool) -> str:
        """The rule `rest`: all that may follow the trigger."""
        if self._headers:
            between = f"({symbol(_ID)} /[a-zA-Z0-9]{{9}}/)? {symbol(_ARGUMENTS)}" if self._ids else symbol(_ARGUMENTS)
            bodies = [f"{literal(tool.name)} {between} {json_of(tool.arguments())}" for tool in tools]
            return repeated("rest", "body", symbol(_OPEN), parallel) + "\n" + any_of("body", bodies)
        calls = repeated("calls", "body", literal(", "), parallel)
        bodies = [json_body(tool, "arguments") for tool in tools]
        return "\n".join((f"rest: {literal('[')} calls {literal(']')}", calls, any_of("body", bodies)))


def _calls(source: Source) -> Reading:
    yield from source.skip_space()
    yield from source.expect(_OPEN)
    first = yield from source.skip_space()
    if first == "{":
        yield from json_call(source)
    elif first != "[":
        yield from _headed_call(source)
    else:
        source.position += 1
        if (yield from source.skip_space()) != "{":
            raise Malformed
        while (yield from source.skip_space(also=",")) == "{":
            yield from json_call(source)
        if (yield from source.starts_with("]")):
            source.position += 1
            source.commit()


def _headed_call(source: Source) -> Reading:
    name, tag = yield from source.until(_ID, _ARGUMENTS, "{")
    if not _NAME.fullmatch(name):
        raise Malformed
    if tag == _ID:
        yield from source.until(_ARGUMENTS)
        tag = _ARGUMENTS
    if tag == _ARGUMENTS:
        source.position += len(_ARGUMENTS)
    if (yield from source.skip_space()) != "{":
        raise Malformed
    yield CallBegin(name.strip())
    yield from streamed_object(source)
    yield CallEnd()
