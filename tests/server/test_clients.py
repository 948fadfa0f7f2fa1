"""The official clients, over scripts and over the built-in model."""

import json
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.server.conftest import LiveServer
from tests.server.scripted import scripted
from tests.server.test_chat import CALLS, WEATHER

QUESTION: Any = [{"role": "user", "content": "How is the weather in Bonn?"}]
TEXT = f"<think>Hmm.</think>Let me see.\n{CALLS['qwen3']}"


class Answer(BaseModel):
    a: int


def openai_client(live: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def anthropic_client(live: LiveServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=live.url, api_key="key", max_retries=0)


def test_openai_chat_with_tools() -> None:
    tools: Any = [WEATHER]
    with scripted("qwen3", TEXT, "<think></think>Sunny.", TEXT) as (live, engine), openai_client(live) as client:
        message = client.chat.completions.create(model="scripted", messages=QUESTION, tools=tools).choices[0].message
        assert message.reasoning_content == "Hmm."  # type: ignore[attr-defined]
        assert message.tool_calls is not None
        call = message.tool_calls[0]
        assert call.type == "function"
        assert json.loads(call.function.arguments) == {"city": "Bonn", "days": 2}
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        conversation = [*QUESTION, message, result]
        answer = client.chat.completions.create(model="scripted", messages=conversation, tools=tools)
        assert answer.choices[0].message.content == "Sunny."
        assert "sunny" in engine.prompt
        with client.chat.completions.stream(model="scripted", messages=QUESTION, tools=tools) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].finish_reason == "tool_calls"
        assert final.choices[0].message.content == "Let me see."
        calls = final.choices[0].message.tool_calls or []
        assert [json.loads(one.function.arguments) for one in calls] == [{"city": "Bonn", "days": 2}]


def test_openai_structured_output_and_usage() -> None:
    with scripted("hermes", '{"a": 1}', "one two") as (live, _), openai_client(live) as client:
        parsed = client.chat.completions.parse(model="scripted", messages=QUESTION, response_format=Answer)
        assert parsed.choices[0].message.parsed == Answer(a=1)
        stream = client.chat.completions.create(
            model="scripted", messages=QUESTION, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens > 0


def test_openai_responses() -> None:
    tool: Any = {"type": "function", "strict": None, **WEATHER["function"]}  # type: ignore[dict-item]
    texts = (TEXT, "<think></think>Sunny.", TEXT, '<think></think>{"a": 1}')
    with scripted("qwen3", *texts) as (live, engine), openai_client(live) as client:
        response = client.responses.create(model="scripted", input="How is the weather?", tools=[tool])
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        assert response.output_text == "Let me see."
        call = response.output[-1]
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        more: Any = [{"role": "user", "content": "?"}, *(item.to_dict() for item in response.output), result]
        assert client.responses.create(model="scripted", input=more, tools=[tool]).output_text == "Sunny."
        assert "<think>Hmm.</think>Let me see.<tool_call>" in engine.prompt
        with client.responses.stream(model="scripted", input="?", tools=[tool]) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds[-1] == "response.completed"
        assert final.output_text == "Let me see."
        assert client.responses.parse(model="scripted", input="?", text_format=Answer).output_parsed == Answer(a=1)


def test_anthropic_messages() -> None:
    tool: Any = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}  # type: ignore[index]
    with scripted("qwen3", TEXT, "<think></think>Sunny.", TEXT) as (live, engine), anthropic_client(live) as client:
        options: Any = {"model": "scripted", "max_tokens": 256, "tools": [tool]}
        message = client.messages.create(messages=QUESTION, **options)
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        use = message.content[2]
        assert use.type == "tool_use"
        assert use.input == {"city": "Bonn", "days": 2}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
        conversation: Any = [
            *QUESTION,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ]
        answer = client.messages.create(messages=conversation, **options)
        assert [block.type for block in answer.content] == ["text"]
        assert "sunny" in engine.prompt
        with client.messages.stream(messages=QUESTION, **options) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == "Let me see."
        assert final.stop_reason == "tool_use"
        assert final.content[2].input == {"city": "Bonn", "days": 2}  # type: ignore[union-attr]
        counted = client.messages.count_tokens(model="scripted", messages=QUESTION, tools=[tool])
        assert counted.input_tokens == len(engine.asked[0].prompt)


def test_errors() -> None:
    with scripted("hermes", api_keys=("key",)) as (live, _):
        with openai_client(live) as client, pytest.raises(openai.AuthenticationError):
            client.responses.create(model="scripted", input="x")
        with anthropic_client(live) as claude:
            with pytest.raises(anthropic.NotFoundError, match="does not exist"):
                claude.messages.create(model="other", max_tokens=1, messages=QUESTION)
            with pytest.raises(anthropic.BadRequestError, match="no tools"):
                claude.messages.create(model="scripted", max_tokens=1, messages=QUESTION, tool_choice={"type": "any"})
    with scripted("hermes") as (live, _), openai_client(live) as client:
        with pytest.raises(openai.BadRequestError, match="nothing is kept") as info:
            client.responses.create(model="scripted", input="x", previous_response_id="resp_1")
        assert info.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=QUESTION)


def test_the_builtin_model(server: LiveServer) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": Answer.model_json_schema()}}
    with openai_client(server) as client:
        answer = client.chat.completions.create(
            model="builtin",
            messages=QUESTION,
            tools=[tool],
            tool_choice="required",
            max_tokens=60,
            temperature=1,
            seed=3,
        )
        calls = answer.choices[0].message.tool_calls or []
        if answer.choices[0].finish_reason == "tool_calls":
            assert Answer.model_validate_json(calls[0].function.arguments)  # type: ignore[union-attr]
        assert calls[0].function.name == "f"  # type: ignore[union-attr]
        response = client.responses.create(model="builtin", input="def f(x):", max_output_tokens=8)
        chat = client.chat.completions.create(
            model="builtin", messages=[{"role": "user", "content": "def f(x):"}], max_tokens=8
        )
        assert response.output_text == chat.choices[0].message.content
    with anthropic_client(server) as claude:
        content: Any = [{"role": "user", "content": "def f(x):"}]
        message = claude.messages.create(model="builtin", max_tokens=8, messages=content)
        assert message.content[0].text == response.output_text  # type: ignore[union-attr]
