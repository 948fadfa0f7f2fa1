"""One call as Qwen3-Coder writes it: <function=name>, a <parameter=...> for each argument, </function>."""

import json
from collections.abc import Generator, Mapping, Sequence

from gfxlm.server.incremental import Malformed, Source, Wait, unsettled
from gfxlm.server.tools.grammar import any_of, json_of, literal
from gfxlm.server.tools.tool import (
    CallArguments,
    CallBegin,
    CallEnd,
    Reading,
    Schema,
    Tool,
    ToolEvent,
    fits,
    line,
    on_one_line,
    types,
)

FUNCTION, PARAMETER = "<function=", "<parameter="
END_FUNCTION, END_PARAMETER = "</function>", "</parameter>"
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def xml_call(source: Source, tools: Mapping[str, Tool]) -> Reading:
    """Read one call. Raises Malformed where it does not begin with a function's name.

    A value is a string, or whatever else the tool's schema allows and the text can be read as. What does not belong
    there ends the call, and is left unread.
    """
    yield from source.expect(FUNCTION)
    name = yield from _name(source)
    source.commit()
    yield CallBegin(name)
    yield CallArguments("{")
    tool = tools.get(name, Tool(name))
    separator, complete = "", True
    while complete and (yield from _next_is(source, PARAMETER)):
        source.position += len(PARAMETER)
        try:
            key = yield from _name(source)
        except Malformed:
            source.rewind()
            break
        source.commit()
        yield CallArguments(f"{separator}{line(key)}: ")
        separator = ", "
        complete = yield from _value(source, tool.property(key))
    if complete and source.rest:
        yield CallArguments("}")
    yield CallEnd()
    if (yield from _next_is(source, END_FUNCTION)):
        source.position += len(END_FUNCTION)
        source.commit()
    else:
        source.rewind()


def _next_is(source: Source, tag: str) -> Wait[bool]:
    yield from source.skip_space()
    return bool((yield from source.starts_with(tag)))


def _name(source: Source) -> Wait[str]:
    text, end = yield from source.until(">", "\n", "<")
    if end != ">" or not text.strip():
        raise Malformed
    source.position += 1
    return text.strip()


def _value(source: Source, schema: Schema) -> Generator[ToolEvent | None, None, bool]:
    """Read a value and its end tag, and pass it on as JSON; False where the text ends before."""
    allowed = types(schema)
    if allowed == {"string"}:
        return (yield from _text_value(source))
    try:
        text, _ = yield from source.until(END_PARAMETER)
    except Malformed:
        source.position = len(source.text)
        yield CallArguments(line(_one_newline_less(source.commit()))[:-1])
        return False
    source.position += len(END_PARAMETER)
    source.commit()
    yield CallArguments(line(converted(_one_newline_less(text), allowed)))
    return True


def _text_value(source: Source) -> Generator[ToolEvent | None, None, bool]:
    """A string, passed on as it comes; the newline that may come before the end tag is not part of it."""
    if (yield from source.starts_with("\n")):
        source.position += 1
    source.commit()
    yield CallArguments('"')
    ends = ("\n" + END_PARAMETER, END_PARAMETER)
    while True:
        end = source.text.find(END_PARAMETER)
        if end >= 0:
            newline = source.text[:end].endswith("\n")
            yield CallArguments(line(source.text[: end - newline])[1:])
            source.position = end + len(END_PARAMETER)
            source.commit()
            return True
        source.position = len(source.text) - (0 if source.ended else unsettled(source.text, ends))
        if source.position:
            yield CallArguments(line(source.commit())[1:-1])
        if source.ended:
            return False
        yield None


def xml_rules(rule: str, tools: Sequence[Tool]) -> str:
    """The rule that is a call of one of the tools."""
    lines = [f"text[suffix={literal(END_PARAMETER)}]: /(?s:.*)/", "key: /[^<>\\n]+/"]
    calls = []
    for i, tool in enumerate(tools):
        parameters = []
        required = tool.parameters.get("required") or ()
        for j, name in enumerate(tool.properties):
            begin = literal(f"{PARAMETER}{name}>\n")
            lines.append(f"{rule}_{i}_{j}: {begin} {_value_rule(tool.property(name))}")
            parameters.append(f"{rule}_{i}_{j}{'' if name in required else '?'}")
        if tool.open_ended:
            parameters.append(f"({literal(PARAMETER)} key {literal('>' + chr(10))} text {literal(chr(10))})*")
        calls.append(" ".join((literal(f"{FUNCTION}{tool.name}>\n"), *parameters, literal(END_FUNCTION))))
    return "\n".join((any_of(rule, calls), *lines))


def _value_rule(schema: Schema) -> str:
    end = literal(f"\n{END_PARAMETER}\n")
    choices = schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        return f"({' | '.join(map(literal, choices))}) {end}"
    allowed = types(schema)
    if not allowed or "string" in allowed:
        return f"text {literal(chr(10))}"
    return f"{json_of(on_one_line(schema))} {end}"


def converted(text: str, allowed: set[str]) -> object:
    """A value of one of the allowed JSON types, or of any that fits where none is known; else the text."""
    word = text.strip().lower()
    if word in _WORDS and (allowed or word == text) and fits(_WORDS[word], allowed):
        return _WORDS[word]
    try:
        value = json.loads(text, strict=False)
        json.dumps(value, allow_nan=False)
    except ValueError:
        return text
    return value if not isinstance(value, str) and fits(value, allowed) else text


def _one_newline_less(text: str) -> str:
    return text.removeprefix("\n").removesuffix("\n")
