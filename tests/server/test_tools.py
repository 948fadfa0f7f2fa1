"""Every parser: what it makes of a text, however the text is cut."""

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfxlm.errors import UserError
from gfxlm.server.incremental import Incremental
from gfxlm.server.tools import FORMATS, Format, detected_format, named_format
from gfxlm.server.tools.tool import CallArguments, CallBegin, CallEnd, Content, Tool, ToolEvent

WEATHER = Tool(
    "get_weather",
    "Today's weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "place": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]},
            "note": {"type": ["string", "null"]},
            "anything": {},
        },
        "required": ["city"],
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}}},
    },
)
CLOCK = Tool("clock", parameters={"type": "object", "properties": {}})
TOOLS = {tool.name: tool for tool in (WEATHER, CLOCK)}

Parsed = tuple[str, list[tuple[str, str]]]


def events(form: Format, pieces: Sequence[str]) -> list[ToolEvent]:
    parser = Incremental[ToolEvent](lambda source: form.parse(source, TOOLS))
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def read(name: str, text: str, template: str = "") -> Parsed:
    """The content and the calls of a text, which is cut in some ways that must not matter."""
    form = named_format(name, template)
    parsed = gathered(events(form, [text]))
    assert gathered(events(form, list(text))) == parsed
    for size in (2, 3, 7):
        assert gathered(events(form, [text[i : i + size] for i in range(0, len(text), size)])) == parsed
    return parsed


def gathered(found: list[ToolEvent]) -> Parsed:
    content, calls, is_open = "", [], False
    for event in found:
        match event:
            case Content(text):
                assert text
                assert not is_open
                content += text
            case CallBegin(name):
                assert not is_open
                calls.append((name, ""))
                is_open = True
            case CallArguments(text):
                assert is_open
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
            case CallEnd():
                assert is_open
                is_open = False
    assert not is_open
    return content, calls


def loaded(parsed: Parsed) -> tuple[str, list[tuple[str, Any]]]:
    return parsed[0], [(name, json.loads(arguments)) for name, arguments in parsed[1]]


ARGUMENTS = {"city": 'Zü}rich "{\\" <tool_call> 漢字 😀', "days": 3}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
CALLS = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {TEXT}}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\n"
    f"{ARGUMENTS['city']}\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    "llama": f'{{"name": "get_weather", "parameters": {TEXT}}}',
    "mistral": f"[TOOL_CALLS]get_weather[ARGS]{TEXT}",
}


@pytest.mark.parametrize("name", FORMATS)
def test_one_call(name: str) -> None:
    assert loaded(read(name, CALLS[name])) == ("", [("get_weather", ARGUMENTS)])


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "mistral"])
def test_content_before_calls_and_no_space_between(name: str) -> None:
    text = f" Let me see. \n\n{CALLS[name]}\n{CALLS[name]}\n"
    assert loaded(read(name, text)) == (" Let me see.", [("get_weather", ARGUMENTS)] * 2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "plain text\n",
        "\n  a < b <tool_cal [TOOL_CALL <|python \n",
        "<tool_call>no call</tool_call> and <tool_call",
        '<tool_call>\n{"nam": 1}\n</tool_call>\n',
        '<tool_call>\n{"name": "clock", "arguments": [1]}\n</tool_call>',
        '<tool_call>{"name": "clo',
        '<tool_call>{"name": "clock", "argume',
        "<tool_call>\n<function=clock",
        '{"answer": {"name": "clock"}} ',
        '{"name": "unknown", "parameters": {}}',
        "[1] is a reference, [clock] is none",
        "[clock(1)]",
        "[clock(**{})] [clock(x=y)]",
        "[unknown(x=1)]",
        "<|python_tag|>brave_search.call(query='x')",
        "[TOOL_CALLS] [1, 2]",
        '[TOOL_CALLS]no name at all[ARGS]{"a": 1}',
        "[TOOL_CALLS]clock[ARGS] oh",
        "[TOOL_CALLS]clock",
        '[TOOL_CALLS][{"name": "\\ud800"}]',
    ],
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    if name != "qwen3_coder" or "<function=" not in text:
        assert read(name, text) == (text, [])


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": {}}, "name": "f"}</tool_call>', [("f", '{"a": {}}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "id": "x"}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut o', [("f", '{"a": "cut o')]),
        ("qwen3_coder", "<function=clock>\n</function>\n</tool_call>", [("clock", "{}")]),
        ("qwen3_coder", "<tool_call><function=clock></tool_call>", [("clock", "{}")]),
        ("qwen3_coder", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', [("f", "{}")]),
        ("llama", '<|python_tag|>{"type": "function", "name": "clock", "parameters": {}}', [("clock", "{}")]),
        (
            "llama",
            '{"name": "clock", "parameters": {}}; {"name": "clock", "parameters": {"a": 1}}',
            [("clock", "{}"), ("clock", '{"a": 1}')],
        ),
        (
            "llama",
            '[clock(), get_weather(city="Bo\'n]", days=[1, 2], exact=true, x=None)]',
            [("clock", "{}"), ("get_weather", '{"city": "Bo\'n]", "days": [1, 2], "exact": true, "x": null}')],
        ),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}, {"name": "g", "arguments": {}}]',
            [("f", '{"a": 1}'), ("g", "{}")],
        ),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}[TOOL_CALLS]g{}', [("f", '{"a": 1}'), ("g", "{}")]),
    ],
)
def test_variants(name: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert read(name, text) == ("", calls)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "12", "12"),
        ("city", "two\nlines\n", "two\nlines\n"),
        ("city", "", ""),
        ("days", "12", 12),
        ("days", "twelve", "twelve"),
        ("days", "1.5", "1.5"),
        ("days", "true", "true"),
        ("exact", "True", True),
        ("exact", "false", False),
        ("place", '{"x": 1.5}', {"x": 1.5}),
        ("place", "null", None),
        ("place", "[1]", "[1]"),
        ("note", "null", None),
        ("note", "[1]", "[1]"),
        ("anything", "[1, NaN]", "[1, NaN]"),
        ("anything", "[1, 1e999]", "[1, 1e999]"),
        ("anything", '{"a": "\\ud800"}', {"a": "\ud800"}),
        ("anything", "None", "None"),
        ("undeclared", "5", 5),
    ],
)
def test_values_take_the_schemas_type(key: str, text: str, value: object) -> None:
    call = f"<tool_call>\n<function=get_weather>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    assert loaded(read("qwen3_coder", call)) == ("", [("get_weather", {key: value})])
    if text.strip() == text != "":
        assert loaded(read("qwen3_coder", call.replace(f"\n{text}\n", text))) == ("", [("get_weather", {key: value})])


def test_a_cut_value_leaves_arguments_open() -> None:
    text = "<tool_call>\n<function=get_weather>\n<parameter=city>\nBo"
    assert read("qwen3_coder", text) == ("", [("get_weather", '{"city": "Bo')])
    text = "<tool_call>\n<function=get_weather>\n<parameter=days>\n12"
    assert read("qwen3_coder", text) == ("", [("get_weather", '{"days": "12')])


def test_arguments_come_as_they_are_written() -> None:
    for name in FORMATS:
        parser = Incremental[ToolEvent](lambda source, form=named_format(name): form.parse(source, TOOLS))
        text = CALLS[name]
        seen = [event for character in text[: text.index("漢")] for event in parser.feed(character)]
        assert seen[0] == CallBegin("get_weather")
        assert "rich" in "".join(event.text for event in seen if isinstance(event, CallArguments))


TAGS = (
    "<tool_call> </tool_call> <function=clock> <parameter= </parameter> </function> <|python_tag|> [TOOL_CALLS] [ARGS]"
)
MEMBERS = ('{"name": "clock"', '"arguments": {', '"parameters"', "clock", "text")
PIECES = st.sampled_from([*"<>{}[]\"'\\\n :,;()=é😀", *CALLS.values(), *TAGS.split(), *MEMBERS])


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=12), st.sampled_from(FORMATS), st.randoms(use_true_random=False))
def test_any_cut_gives_the_same(parts: list[str], name: str, random: Any) -> None:
    text = "".join(parts)
    cuts = sorted(random.choices(range(len(text) + 1), k=random.randint(0, 12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    form = named_format(name)
    content, calls = gathered(events(form, pieces))
    assert (content, calls) == gathered(events(form, [text]))
    if not calls:
        assert content == text


@pytest.mark.parametrize(
    ("template", "vocabulary", "name"),
    [
        ("'<tool_call>\\n<function=' + tool_call.name", (), "qwen3_coder"),
        ("<tool_call>\n<function=", (), "qwen3_coder"),
        ('<tool_call>\\n{"name": ', (), "hermes"),
        ("[TOOL_CALLS]' + x + '[ARGS]", (), "mistral"),
        ("<|python_tag|>", (), "llama"),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name', (), "llama"),
        ("", ("<tool_call>",), "hermes"),
        ("", ("[TOOL_CALLS]",), "mistral"),
    ],
)
def test_the_format_is_found(template: str, vocabulary: tuple[str, ...], name: str) -> None:
    found = detected_format(template, vocabulary)
    assert found is not None
    assert found.name == name


def test_no_format() -> None:
    assert detected_format("{{ messages }}", ()) is None
    with pytest.raises(UserError, match="hermes, qwen3_coder, llama, mistral, but is 'xml'"):
        named_format("xml")
    assert named_format("json_tools").name == "hermes"


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("hermes", "", ""),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', '"}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": "', '"}, "name": "f"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"', '\\"}"}'),
        ("qwen3_coder", "<function=get_weather><parameter=city>", "</parameter></function>"),
        ("qwen3_coder", "<function=get_weather><parameter=anything>", "</parameter></function>"),
        ("llama", "[clock(a='", "')]"),
        ("mistral", "[TOOL_CALLS]", ""),
    ],
)
@pytest.mark.parametrize("filling", ["some text ", "          "])
def test_time_does_not_grow_with_the_square_of_the_length(name: str, begin: str, end: str, filling: str) -> None:
    text = begin + filling * 5000 + end
    start = time.process_time()
    events(named_format(name), [text[i : i + 4] for i in range(0, len(text), 4)])
    assert time.process_time() - start < 4
