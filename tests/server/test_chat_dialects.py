"""Whatever a model says, all dialects say the same of it, at once or as it comes."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server import test_chat, test_messages, test_responses
from tests.server.conftest import LiveServer
from tests.server.scripted import Scripted, scripted
from tests.server.test_chat import CALLS

Said = tuple[str, str, list[tuple[str, str]]]  # thinking, text, calls
Live = tuple[LiveServer, Scripted]

TAGS = "<think> </think> <tool_call> </tool_call> <function=clock> <parameter=a> </parameter> </function> [TOOL_CALLS]"
PIECES = [
    *TAGS.split(),
    *CALLS.values(),
    '{"name": "clock", "arguments": {',
    '"a": "é"}',
    "}",
    "text ",
    "\n",
    " ",
    "😀",
]


def chat_whole(live: LiveServer, **body: Any) -> Said:
    message = test_chat.post(live, tools=[test_chat.WEATHER, test_chat.CLOCK], **body).json()["choices"][0]["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message.get("reasoning", ""), message["content"] or "", calls


def chat_streamed(live: LiveServer, **body: Any) -> Said:
    parts = test_chat.chunks(live, tools=[test_chat.WEATHER, test_chat.CLOCK], **body)
    calls: list[tuple[str, str]] = []
    for delta in [call for part in parts for call in part["choices"][0]["delta"].get("tool_calls", ())]:
        if "id" in delta:
            calls.append((delta["function"]["name"], ""))
        calls[delta["index"]] = (calls[-1][0], calls[-1][1] + delta["function"]["arguments"])
    return test_chat.joined(parts, "reasoning"), test_chat.joined(parts, "content"), calls


def _items(output: list[dict[str, Any]]) -> Said:
    texts = {"reasoning": "", "message": ""}
    for item in output:
        if item["type"] in texts:
            texts[item["type"]] += item["content"][0]["text"]
    calls = [(item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
    return texts["reasoning"], texts["message"], calls


TOOLS = [test_responses.WEATHER, {"type": "function", "name": "clock"}]


def responses_whole(live: LiveServer, **body: Any) -> Said:
    return _items(test_responses.post(live, tools=TOOLS, **body).json()["output"])


def responses_streamed(live: LiveServer, **body: Any) -> Said:
    items: list[dict[str, Any]] = []
    for event in test_responses.events(live, tools=TOOLS, **body):
        if event["type"] == "response.output_item.added":
            items.append({**event["item"], "content": [{"text": ""}], "arguments": ""})
        elif event["type"] == "response.function_call_arguments.delta":
            items[event["output_index"]]["arguments"] += event["delta"]
        elif event["type"].endswith("_text.delta"):
            items[event["output_index"]]["content"][0]["text"] += event["delta"]
        elif event["type"] == "response.output_item.done":
            done = event["item"]
            assert done.get("arguments", "") == items[-1]["arguments"]
            assert [part["text"] for part in done.get("content", ())] in ([], [items[-1]["content"][0]["text"]])
    return _items(items)


def messages_streamed(live: LiveServer, **body: Any) -> Said:
    thinking, text, calls = "", "", []
    tools = [test_messages.WEATHER, {"name": "clock", "input_schema": {"type": "object"}}]
    for event in test_messages.events(live, tools=tools, **body):
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            calls.append((event["content_block"]["name"], ""))
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            thinking += delta.get("thinking", "")
            text += delta.get("text", "")
            if "partial_json" in delta:
                calls[-1] = (calls[-1][0], calls[-1][1] + delta["partial_json"])
    return thinking, text, calls


@pytest.fixture(scope="module", params=["qwen3", "qwen3_coder", "mistral", "llama"])
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    with scripted(request.param) as both:
        yield both


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8))
def test_all_say_the_same(live: Live, pieces: list[str]) -> None:
    server, engine = live
    text = "".join(pieces)
    engine.texts += [text] * 5
    said = chat_whole(server)
    assert chat_streamed(server) == said
    assert responses_whole(server) == said
    assert responses_streamed(server) == said
    assert messages_streamed(server) == said
    assert not engine.texts
    for _, arguments in said[2][:-1]:  # the last one may have been cut
        assert arguments.startswith("{")
    if not said[2] and not said[0] and "think" not in text:
        assert said[1] == text
    for name, arguments in said[2]:
        if name == "get_weather" and "parameter" not in text:
            assert json.loads(arguments) == {"city": "Bonn", "days": 2}
