"""POST /v1/messages and /v1/messages/count_tokens."""

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import LiveServer
from tests.server.scripted import scripted
from tests.server.test_chat import CALLS

WEATHER = {
    "name": "get_weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
ASK: dict[str, Any] = {"max_tokens": 256, "messages": [{"role": "user", "content": "Hello"}]}


def post(live: LiveServer, path: str = "/v1/messages", **body: Any) -> httpx.Response:
    with live.client() as client:
        return client.post(path, json={**ASK, **body})


def events(live: LiveServer, **body: Any) -> list[dict[str, Any]]:
    blocks = [block.splitlines() for block in post(live, stream=True, **body).text.split("\n\n") if block]
    found = [json.loads(block[1].removeprefix("data: ")) for block in blocks]
    assert [block[0].removeprefix("event: ") for block in blocks] == [event["type"] for event in found]
    return found


def test_an_answer() -> None:
    with scripted("hermes", "Guten Tag") as (live, engine):
        engine.cached = 4
        body = post(live, system=[{"type": "text", "text": "Be brief."}], metadata={"user_id": "x"}).json()
        assert engine.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello")
        assert engine.params.max_tokens == 256
        assert body.pop("id").startswith("msg_")
        assert body == {
            "type": "message",
            "role": "assistant",
            "model": "scripted",
            "content": [{"type": "text", "text": "Guten Tag"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": len(engine.asked[0].prompt) - 4,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4,
                "output_tokens": len(engine.asked[0].tokens),
            },
        }


def test_events_in_order() -> None:
    text = f"<think>Hmm.</think>Let me see.\n{CALLS['qwen3']}"
    with scripted("qwen3", text, text) as (live, _):
        found = events(live, tools=[WEATHER], thinking={"type": "enabled", "budget_tokens": 1024})
        whole = post(live, tools=[WEATHER]).json()
    short = [event["type"] for event in found]
    order = [name for i, name in enumerate(short) if i == 0 or short[i - 1] != name]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert order == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
    assert found[0]["message"]["content"] == []
    starts = [event for event in found if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == [0, 1, 2]
    assert [event["content_block"]["type"] for event in starts] == ["thinking", "text", "tool_use"]
    deltas: dict[str, str] = {}
    for event in found:
        if event["type"] == "content_block_delta":
            kind, text = (event["delta"][key] for key in event["delta"])
            deltas[kind] = deltas.get(kind, "") + text
    assert deltas["thinking_delta"] == "Hmm."
    assert deltas["text_delta"] == "Let me see."
    assert json.loads(deltas["input_json_delta"]) == {"city": "Bonn", "days": 2}
    assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] > 10
    assert [item["type"] for item in whole["content"]] == ["thinking", "text", "tool_use"]
    assert whole["content"][2]["input"] == {"city": "Bonn", "days": 2}
    assert whole["stop_reason"] == "tool_use"


def test_the_conversation_given_back() -> None:
    messages = [
        {"role": "user", "content": "When?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hmm", "signature": ""},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "c1", "name": "clock", "input": {"a": 1}},
                {"type": "tool_use", "id": "c2", "name": "clock", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "noon"}]},
                {"type": "tool_result", "tool_use_id": "c2", "content": "broken", "is_error": True},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    with scripted("qwen3", "Noon.") as (live, engine):
        assert post(live, messages=messages, tools=[WEATHER]).json()["content"] == [{"type": "text", "text": "Noon."}]
        prompt = engine.prompt
        count = post(live, "/v1/messages/count_tokens", messages=messages, tools=[WEATHER]).json()
        assert count == {"input_tokens": len(engine.asked[0].prompt)}
    assert "<think>Hmm</think>Let me see.<tool_call>" in prompt
    assert '{"name": "clock", "arguments": {"a": 1}}' in prompt
    assert (
        "<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>tool\nError: broken<|im_end|>\n<|im_start|>user\nSo?<|im_end|>"
        in prompt
    )


def test_choices_stops_and_prefill() -> None:
    call = CALLS["qwen3"]
    texts = (call, call, call * 2, "one STOP two", "one two three", " a time", '{"a": 1}', call)
    with scripted("hermes", *texts) as (live, engine):
        assert post(live, tools=[WEATHER], tool_choice={"type": "any"}).json()["stop_reason"] == "tool_use"
        named = {"type": "tool", "name": "get_weather"}
        assert post(live, tools=[WEATHER], tool_choice=named).json()["stop_reason"] == "tool_use"
        assert engine.params.grammar is not None
        one = {"type": "auto", "disable_parallel_tool_use": True}
        assert len(post(live, tools=[WEATHER], tool_choice=one).json()["content"]) == 1
        body = post(live, stop_sequences=["STOP"]).json()
        assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "STOP")
        assert body["content"] == [{"type": "text", "text": "one "}]
        assert post(live, max_tokens=1).json()["stop_reason"] == "max_tokens"
        messages = [*ASK["messages"], {"role": "assistant", "content": "Once upon"}]
        assert post(live, messages=messages).json()["content"] == [{"type": "text", "text": " a time"}]
        assert engine.prompt.endswith("Once upon")
        format = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
        assert post(live, output_config={"format": format}).json()["content"][0]["text"] == '{"a": 1}'
        body = post(live, tools=[WEATHER], tool_choice={"type": "none"}).json()
        assert "get_weather" not in engine.prompt
        assert body["content"] == [{"type": "text", "text": call}]


def test_thinking_can_be_switched() -> None:
    with scripted("qwen3", "a", "a", "a") as (live, engine):
        post(live, thinking={"type": "disabled"})
        assert engine.prompt.endswith("</think>\n\n")
        post(live, thinking={"type": "adaptive"})
        assert engine.prompt.endswith("assistant\n")


def test_a_call_that_is_cut_is_text() -> None:
    with scripted("hermes", CALLS["qwen3"]) as (live, _):
        body = post(live, tools=[WEATHER], max_tokens=18).json()
        assert body["stop_reason"] == "max_tokens"
        assert body["content"][0]["type"] == "text"
        assert body["content"][0]["text"].startswith('get_weather {"city')


def test_errors_in_anthropics_shape() -> None:
    with scripted("hermes", "one two three", "one two three") as (live, engine):
        engine.fail_after = 3
        body = post(live).json()
        assert (body["type"], body["error"]["type"]) == ("error", "api_error")
        assert body["error"]["message"] == "the script broke"
        found = events(live)
        assert found[-1]["type"] == "error"
        assert found[-1]["error"]["message"] == "the script broke"
        body = post(live, model="claude").json()
        assert body["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image' are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "needs a string tool_use_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [1]}]}]},
            "tool_result: must be a string or a list of parts",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": 1}]}]}, "must be an object"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "needs a name"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"output_config": {"effort": "much"}}, "output_config.effort: Input"),
    ],
)
def test_what_cannot_be_done(body: dict[str, Any], message: str, refusing: LiveServer) -> None:
    answer = post(refusing, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert message in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def refusing() -> Any:
    with scripted("hermes") as (live, _):
        yield live
