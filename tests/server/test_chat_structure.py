"""Structured output in chats, in everybody's words for it."""

from typing import Any

import pytest

from tests.server.scripted import scripted
from tests.server.test_chat import CALLS, WEATHER, post

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            '{"a": 1}',
            "{}",
        ),
        ({"response_format": {"type": "json_object"}}, '{"b": [1]}', "[1]"),
        ({"response_format": {"type": "text"}}, "anything", None),
        ({"structured_outputs": {"json": SCHEMA}}, '{"a": 1}', '{"a": "b"}'),
        ({"structured_outputs": {"regex": "[ab]+"}}, "abba", "abc"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "maybe"),
        ({"structured_outputs": {"grammar": 'start: "a" "b"*'}}, "abb", "b"),
        ({"json_schema": SCHEMA}, '{"a": 1}', "{}"),
        ({"grammar": 'root ::= "x" [0-9]+'}, "x12", "y"),
    ],
)
def test_structured_output(field: dict[str, Any], good: str, bad: str | None) -> None:
    with scripted("hermes", good, good if bad is None else bad) as (live, _):
        assert post(live, **field).json()["choices"][0]["message"]["content"] == good
        assert post(live, **field).status_code == (200 if bad is None else 400)


def test_structured_output_after_thinking_and_beside_tools() -> None:
    body = {"response_format": {"type": "json_object"}}
    texts = ('<think>so {</think>{"a": 1}', f"<think></think>{CALLS['qwen3']}", '<think></think>{"b": 1}', "x")
    with scripted("qwen3", *texts) as (live, _):
        assert post(live, **body).json()["choices"][0]["message"]["content"] == '{"a": 1}'
        assert post(live, tools=[WEATHER], **body).json()["choices"][0]["finish_reason"] == "tool_calls"
        assert post(live, tools=[WEATHER], **body).json()["choices"][0]["message"]["content"] == '{"b": 1}'
        regex = {"structured_outputs": {"regex": "a"}}
        assert "does not go with tools" in post(live, tools=[WEATHER], **regex).json()["error"]["message"]
