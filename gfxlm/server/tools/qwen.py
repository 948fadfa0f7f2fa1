"""Calls between <tool_call> and </tool_call>: as JSON (Hermes, Qwen2.5, Qwen3) or as XML (Qwen3-Coder and later)."""

from collections.abc import Mapping, Sequence

from gfxlm.server.incremental import Source
from gfxlm.server.tools.grammar import Symbol, any_of, json_of, literal, repeated
from gfxlm.server.tools.json_call import json_call
from gfxlm.server.tools.tool import Parse, Reading, Tool, content_and_calls, new_call_id
from gfxlm.server.tools.xml_call import FUNCTION, xml_call, xml_rules

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    """<tool_call>, an object with name and arguments, </tool_call>."""

    name = "hermes"
    trigger = _OPEN
    _begins: tuple[str, ...] = (_OPEN,)

    def parse(self, source: Source, tools: Mapping[str, Tool]) -> Parse:
        """Content and calls. Calls may have either form, as models mix them up."""
        return content_and_calls(source, self._begins, lambda tag: _call(source, tools, tag))

    def call_id(self) -> str:
        """A new one, as any other."""
        return new_call_id()

    def rules(self, tools: Sequence[Tool], symbol: Symbol, *, parallel: bool) -> str:
        """The rule `rest`: all that may follow the trigger."""
        newline = literal("\n")
        return "\n".join(
            (
                repeated("rest", "call", f"{newline} {symbol(_OPEN)}", parallel),
                f"call: {newline} body {newline} {symbol(_CLOSE)}",
                self._bodies(tools),
            )
        )

    def _bodies(self, tools: Sequence[Tool]) -> str:
        return any_of("body", (json_body(tool, "arguments") for tool in tools))


class Qwen3Coder(Hermes):
    """<tool_call>, <function=name>, parameters, </function>, </tool_call>; models forget the first tag."""

    name = "qwen3_coder"
    _begins = (_OPEN, FUNCTION)

    def _bodies(self, tools: Sequence[Tool]) -> str:
        return xml_rules("body", tools)


def written_call(body: str) -> str:
    """A call as Hermes' models write it, of an object with name and arguments as JSON."""
    return f"{_OPEN}\n{body}\n{_CLOSE}"


def json_body(tool: Tool, arguments: str) -> str:
    """A call of the tool as an object, its arguments under that name."""
    begin = literal(f'{{"name": {literal(tool.name)}, "{arguments}": ')
    return f"{begin} {json_of(tool.arguments())} {literal('}')}"


def _call(source: Source, tools: Mapping[str, Tool], tag: str) -> Reading:
    yield from source.skip_space()
    if tag == _OPEN:
        yield from source.expect(_OPEN)
        yield from source.skip_space()
    if (yield from source.starts_with(FUNCTION)):
        yield from xml_call(source, tools)
    else:
        yield from json_call(source)
    yield from source.skip_space()
    if (yield from source.starts_with(_CLOSE)):
        source.position += len(_CLOSE)
        source.commit()
    else:
        source.rewind()
