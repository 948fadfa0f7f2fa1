"""The grammars that hold a model to its tools, in the tokens of models that have tags, and of one that has none."""

import dataclasses
from typing import Any

import pytest

from gfxlm.engine.grammar import Grammar, Grammars
from gfxlm.server.reasoning import Thinking
from gfxlm.server.template import ChatOptions, Prompt
from gfxlm.server.tools import named_format
from gfxlm.server.tools.tool import Tool
from gfxlm.server.turn import Ask, ToolChoice, constraint
from gfxlm.server.vocabulary import Vocabulary
from tests.server.scripted import tokenizer_of

PAINT = Tool(
    "paint",
    parameters={
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "colour": {"type": "string", "enum": ["red", "dark red"]},
            "n": {"type": "integer"},
            "where": {"$ref": "#/$defs/point"},
            "note": {"type": ["string", "null"]},
        },
        "required": ["text"],
        "$defs": {"point": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}},
    },
)
ANY = Tool("any", parameters={"type": "object"})
STOP = Tool("stop")
TOOLS = (PAINT, ANY, STOP)
REQUIRED = ToolChoice(mode="required")
ONE = ToolChoice(mode="required", parallel=False)


def grammar(form: str, template: str = "", style: str = "qwen3", **ask: Any) -> Grammar | None:
    ask = {"messages": [], "options": ChatOptions(template={}), "tools": TOOLS, "choice": REQUIRED, **ask}
    thinking = ask.pop("thinking", None)
    return constraint(Ask(**ask), Prompt([], thinking, named_format(form, template)), Vocabulary(tokenizer_of(style)))


def accepts(found: Grammar | None, text: str, style: str = "qwen3") -> bool:
    """Whether the text, and an end of it, are allowed."""
    assert found is not None
    tokenizer = tokenizer_of(style)
    grammars = _compiler(style)
    matcher = grammars.matcher(found)
    for token in [*tokenizer.encode(text, add_special_tokens=False), min(tokenizer.eos_token_ids)]:
        if not (int(grammars.masks([matcher])[0, token // 32]) >> (token % 32)) & 1:
            return False
        matcher.accept(token)
    return True


COMPILERS: dict[str, Grammars] = {}


def _compiler(style: str) -> Grammars:
    tokenizer = tokenizer_of(style)
    return COMPILERS.setdefault(style, Grammars(tokenizer, len(tokenizer)))


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def xml(name: str, *parameters: tuple[str, str]) -> str:
    texts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{texts}</function>\n</tool_call>"


@pytest.mark.parametrize("style", ["qwen3", "none"])
def test_hermes(style: str) -> None:
    many, one = grammar("hermes", style=style), grammar("hermes", style=style, choice=ONE)
    call = hermes("paint", '{"text": "a <b> \\"c\\" é", "where": [1, 2]}')
    assert accepts(many, call, style)
    assert accepts(one, call, style)
    assert accepts(many, f"{call}\n{hermes('stop', '{}')}", style)
    assert not accepts(one, f"{call}\n{call}", style)
    assert accepts(many, hermes("any", '{"x": [null]}'), style)
    for wrong in (hermes("paint", "{}"), hermes("paint", '{"text": "", "more": 1}'), hermes("stop", '{"a": 1}')):
        assert not accepts(many, wrong, style)
    for wrong in ("", "text", f"text {call}", hermes("draw", "{}"), hermes("paint", '{"text": "", "where": [1]}')):
        assert not accepts(many, wrong, style)


def test_qwen3_coder() -> None:
    found = grammar("qwen3_coder")
    assert accepts(found, xml("paint", ("text", "two\nlines <b>\n")))
    assert accepts(found, xml("paint", ("text", ""), ("colour", "dark red"), ("n", "-3"), ("where", "[1, 2]")))
    assert accepts(found, xml("paint", ("text", "x"), ("note", "null")))
    assert accepts(found, xml("stop"))
    assert accepts(found, xml("any", ("a", "1"), ("b", "x")))
    assert accepts(found, f"{xml('stop')}\n{xml('stop')}")
    for wrong in (
        (("text", "x"), ("colour", "blue")),
        (("text", "x"), ("n", "x")),
        (("n", "1"),),
        (("text", "x"), ("b", "")),
    ):
        assert not accepts(found, xml("paint", *wrong))
    assert not accepts(found, xml("stop", ("a", "1")))


def test_a_schema_that_is_none_breaks_nothing() -> None:
    odd = Tool("odd", parameters={"properties": {"a": {"anyOf": 3}, "b": 5, "c": {"type": ["string", 1]}}})
    assert accepts(grammar("qwen3_coder", tools=[odd]), xml("odd", ("a", "x"), ("b", "y")))


def test_mistral() -> None:
    headed, listed = grammar("mistral", "[ARGS]"), grammar("mistral")
    call = '{"name": "paint", "arguments": {"text": "x"}}'
    assert accepts(headed, '[TOOL_CALLS]paint[ARGS]{"text": "x"}')
    assert accepts(headed, '[TOOL_CALLS]paint[ARGS]{"text": "x"}[TOOL_CALLS]stop[ARGS]{}')
    assert not accepts(headed, f"[TOOL_CALLS][{call}]")
    assert not accepts(headed, '[TOOL_CALLS]paint[CALL_ID]abcdefghi[ARGS]{"text": "x"}')
    with_ids = grammar("mistral", "[CALL_ID] [ARGS]")
    assert accepts(with_ids, '[TOOL_CALLS]paint[CALL_ID]abcdefghi[ARGS]{"text": "x"}')
    assert accepts(with_ids, '[TOOL_CALLS]paint[ARGS]{"text": "x"}')
    assert accepts(listed, f"[TOOL_CALLS][{call}]")
    assert accepts(listed, f"[TOOL_CALLS][{call}, {call}]")
    assert not accepts(grammar("mistral", choice=ONE), f"[TOOL_CALLS][{call}, {call}]")
    assert not accepts(listed, "[TOOL_CALLS][]")


def test_llama() -> None:
    found = grammar("llama")
    assert accepts(found, '{"name": "paint", "parameters": {"text": "x"}}')
    assert not accepts(found, '{"name": "paint", "parameters": {}}')


def test_a_named_tool() -> None:
    found = grammar("hermes", choice=ToolChoice(mode="required", name="stop"))
    assert accepts(found, hermes("stop", "{}"))
    assert not accepts(found, hermes("any", "{}"))


@pytest.mark.parametrize("inside", [True, False])
def test_after_thinking(inside: bool) -> None:
    end = tokenizer_of("qwen3").convert_tokens_to_ids("</think>")
    thinking = Thinking("<think>", "</think>", end, inside=inside, expected=True)
    begun = "" if inside else "<think>\n"
    for tools in (TOOLS, [dataclasses.replace(tool, strict=True) for tool in TOOLS]):
        choice = REQUIRED if tools is TOOLS else ToolChoice()
        found = grammar("hermes", thinking=thinking, tools=tools, choice=choice)
        assert accepts(found, f"{begun}hmm {{</think>\n\n{hermes('stop', '{}')}")
        assert accepts(found, f"{begun}hmm</think>{hermes('stop', '{}')}")
        assert not accepts(found, f"{begun}hmm</think>{hermes('stop', '{1}')}")
        assert not accepts(found, f"{begun}hmm")
        assert accepts(found, f"{begun}hmm</think>\n\ntext") == (choice.mode == "auto")


def test_what_may_come() -> None:
    assert grammar("hermes", choice=ToolChoice()) is None
    assert grammar("hermes", tools=()[:0], choice=ToolChoice()) is None
    structured = grammar("hermes", choice=ToolChoice(), structure=Grammar("json_schema", '{"type": "integer"}'))
    assert accepts(structured, "12")
    assert accepts(structured, hermes("stop", "{}"))
    assert not accepts(structured, "twelve")
    strict = [dataclasses.replace(STOP, strict=True)]
    assert accepts(grammar("hermes", choice=ToolChoice(), tools=strict), f"A <b>: {hermes('stop', '{}')}")
    # Without a token to begin with, who could say where a call begins?
    assert grammar("hermes", style="none", choice=ToolChoice(), tools=strict) is None
    assert grammar("llama", choice=ToolChoice(), tools=strict) is None
