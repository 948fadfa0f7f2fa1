"""POST /v1/responses."""

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import LiveServer
from tests.server.scripted import scripted
from tests.server.test_chat import CALLS

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}


def post(live: LiveServer, **body: Any) -> httpx.Response:
    with live.client() as client:
        return client.post("/v1/responses", json={"input": "Hello", **body})


def events(live: LiveServer, **body: Any) -> list[dict[str, Any]]:
    blocks = [block.splitlines() for block in post(live, stream=True, **body).text.split("\n\n") if block]
    found = [json.loads(block[1].removeprefix("data: ")) for block in blocks]
    assert [block[0].removeprefix("event: ") for block in blocks] == [event["type"] for event in found]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def names(found: list[dict[str, Any]]) -> list[str]:
    """The events' names in order, a run of the same one once."""
    short = [event["type"].removeprefix("response.") for event in found]
    return [name for i, name in enumerate(short) if i == 0 or short[i - 1] != name]


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    varying = ("id", "created_at", "timings", "call_id")
    output = [{key: value for key, value in item.items() if key not in varying} for item in response["output"]]
    return {key: value for key, value in response.items() if key not in varying} | {"output": output}


def test_thinking_text_and_calls() -> None:
    text = f"<think>Hmm.</think>Let me see.\n{CALLS['qwen3']}\n{CALLS['qwen3']}"
    with scripted("qwen3", text, text) as (live, engine):
        engine.cached = 2
        whole = post(live, tools=[WEATHER], instructions="Be brief.").json()
        assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello" in engine.prompt
        found = events(live, tools=[WEATHER], instructions="Be brief.")
    item = ["output_item.added", "content_part.added"]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert names(found) == [
        *("created", "in_progress"),
        *(*item, "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"),
        *(*item, "output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        *(*call, *call, "completed"),
    ]
    assert without_ids(found[-1]["response"]) == without_ids(whole)
    reasoning, message, *calls = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert message["content"][0]["text"] == "Let me see."
    assert [json.loads(call["arguments"]) for call in calls] == [{"city": "Bonn", "days": 2}] * 2
    assert {item["status"] for item in whole["output"]} == {"completed"} == {whole["status"]}
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 2
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert whole["store"] is False
    deltas = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert deltas == "Let me see."
    for event in found:
        if "item_id" in event:
            assert event["item_id"] == found[-1]["response"]["output"][event["output_index"]]["id"]


def test_the_conversation_given_back() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "When?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hmm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "c1", "name": "clock", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "one"}]},
    ]
    with scripted("qwen3", "Noon.") as (live, engine):
        assert post(live, input=items).json()["output"][0]["content"][0]["text"] == "Noon."
        prompt = engine.prompt
    assert prompt.startswith("<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n<think>Hmm</think>Let me see.")
    assert prompt.count("<|im_start|>assistant") == 2
    assert prompt.count("<tool_call>") == 2
    assert "<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>tool\none<|im_end|>" in prompt


def test_length_schema_logprobs_and_choice() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    format = {"type": "json_schema", "name": "x", "schema": schema}
    with scripted("hermes", "one two", "one two", '{"a": 1}', '{"b": 1}', "Hi", CALLS["qwen3"]) as (live, engine):
        cut = post(live, max_output_tokens=1).json()
        assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert cut["output"][0]["status"] == "incomplete"
        assert names(events(live, max_output_tokens=1))[-1] == "incomplete"
        body = post(live, text={"format": format}).json()
        assert body["output"][0]["content"][0]["text"] == '{"a": 1}'
        assert body["text"]["format"] == format
        assert post(live, text={"format": format}).status_code == 400
        body = post(live, include=["message.output_text.logprobs"], top_logprobs=1).json()
        logprobs = body["output"][0]["content"][0]["logprobs"]
        assert "".join(entry["token"] for entry in logprobs) == "Hi"
        assert len(logprobs[0]["top_logprobs"]) == 1
        choice = {"type": "function", "name": "get_weather"}
        body = post(live, tools=[WEATHER], tool_choice=choice, reasoning={"effort": "none"}).json()
        assert body["output"][0]["name"] == "get_weather"
        assert engine.params.grammar is not None


def test_failures() -> None:
    with scripted("hermes", "one two three", "one two three") as (live, engine):
        engine.fail_after = 3
        assert post(live).status_code == 500
        found = events(live)
        assert found[-1]["type"] == "response.failed"
        assert found[-1]["response"]["error"] == {"code": "server_error", "message": "the script broke"}
        assert found[-1]["response"]["status"] == "failed"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"previous_response_id": "resp_1"}, "nothing is kept"),
        ({"conversation": "conv_1"}, "nothing is kept"),
        ({"background": True}, "not supported"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference' are not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "'input_image'"),
        ({"input": [{"role": "robot", "content": "x"}]}, "role must be one of"),
        ({"input": [{"role": "user", "content": 5}]}, "must be a string"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]}, "arguments: must be a string"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "must be a string or a list of parts"),
        ({"input": [{"role": "user", "content": [5]}]}, "must be a string or a list of parts"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text: type json_schema has no schema"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort: Input"),
        ({"reasoning": {"summary": "short"}}, "reasoning.summary: Input"),
        ({"include": ["message.output_text"]}, "include[0]: Input"),
    ],
)
def test_what_cannot_be_done(body: dict[str, Any], message: str, refusing: LiveServer) -> None:
    for answer in (post(refusing, **body), post(refusing, stream=True, **body)):
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def refusing() -> Any:
    with scripted("hermes") as (live, _):
        yield live
