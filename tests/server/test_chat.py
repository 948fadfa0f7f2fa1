"""POST /v1/chat/completions, over scripts and over the built-in model."""

import json
from typing import Any

import httpx
import pytest

import gfxlm
from tests.server.conftest import LiveServer
from tests.server.scripted import scripted

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Today's weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
CALLS = {
    "qwen3": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn", "days": 2}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nBonn\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
    "llama": '{"name": "get_weather", "parameters": {"city": "Bonn", "days": 2}}',
    "mistral": '[TOOL_CALLS]get_weather[ARGS]{"city": "Bonn", "days": 2}',
}


def post(live: LiveServer, **body: Any) -> httpx.Response:
    with live.client() as client:
        return client.post("/v1/chat/completions", json={**ASK, **body})


def chunks(live: LiveServer, **body: Any) -> list[dict[str, Any]]:
    lines = [line for line in post(live, stream=True, **body).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(parts: list[dict[str, Any]], key: str) -> str:
    return "".join(choice["delta"].get(key) or "" for part in parts for choice in part["choices"])


def test_an_answer() -> None:
    with scripted("hermes", "Guten Tag, wie geht's? 😀") as (live, engine):
        answer = post(live, user="me", metadata={"a": "b"}, store=True)
        assert "Warning" not in answer.headers
        body = answer.json()
        assert engine.prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert body["object"] == "chat.completion"
    assert body["model"] == "scripted"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Guten Tag, wie geht's? 😀", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(engine.asked[0].prompt)
    assert usage["completion_tokens"] == len(engine.asked[0].tokens)
    assert body["timings"]["predicted_n"] == usage["completion_tokens"]


def test_chunks_in_order() -> None:
    with scripted("hermes", "Guten Tag") as (live, engine):
        engine.cached = 3
        parts = chunks(live, stream_options={"include_usage": True})
    assert parts[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert joined(parts, "content") == "Guten Tag"
    assert [part["choices"][0]["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 2) + ["stop"]
    assert all(part["usage"] is None for part in parts[:-1])
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert len({part["id"] for part in parts}) == 1


def test_thinking() -> None:
    text = "<think>\nHmm, 漢字.\n\nWell.\n</think>\n\nYes.\n"
    with scripted("qwen3", text, text, "Just yes.") as (live, engine):
        message = post(live).json()["choices"][0]["message"]
        assert message["reasoning"] == message["reasoning_content"] == "Hmm, 漢字.\n\nWell."
        assert message["content"] == "Yes.\n"
        parts = chunks(live)
        assert joined(parts, "reasoning") == joined(parts, "reasoning_content") == "Hmm, 漢字.\n\nWell."
        assert joined(parts, "content") == "Yes.\n"
        body = post(live, reasoning_effort="none").json()
        assert engine.prompt.endswith("<think>\n\n</think>\n\n")
        assert body["choices"][0]["message"]["content"] == "Just yes."


def test_thinking_that_the_prompt_opens() -> None:
    with scripted("opened", "Hmm.</think>Yes.", "never ends") as (live, _):
        message = post(live, messages=[{"role": "user", "content": "what does <think> mean?"}]).json()["choices"][0][
            "message"
        ]
        assert (message["reasoning"], message["content"]) == ("Hmm.", "Yes.")
        message = post(live).json()["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == ("never ends", "")


def test_tags_are_text_where_nothing_thinks() -> None:
    with scripted("hermes", "<think>Hmm</think>", "not thinking: <think>") as (live, _):
        assert post(live).json()["choices"][0]["message"]["content"] == "<think>Hmm</think>"


@pytest.mark.parametrize("style", CALLS)
def test_a_call(style: str) -> None:
    with scripted(style, CALLS[style], CALLS[style]) as (live, engine):
        choice = post(live, tools=[WEATHER, CLOCK]).json()["choices"][0]
        assert '"name": "clock"' in engine.prompt
        assert engine.params.grammar is None
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Bonn", "days": 2}
        parts = chunks(live, tools=[WEATHER, CLOCK])
    deltas = [c for part in parts for choice in part["choices"] for c in choice["delta"].get("tool_calls", ())]
    assert deltas[0]["type"] == "function"
    assert deltas[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert json.loads("".join(delta["function"]["arguments"] for delta in deltas)) == {"city": "Bonn", "days": 2}
    assert {delta["index"] for delta in deltas} == {0}
    assert parts[-1]["choices"][0]["finish_reason"] == "tool_calls"
    if style == "mistral":
        assert len(call["id"]) == 9
        assert call["id"].isalnum()
    elif style != "llama":  # which has no more than one, at the end
        assert len(deltas) > 3


@pytest.mark.parametrize("style", CALLS)
def test_a_call_that_must_come_is_held_to_the_schema(style: str) -> None:
    call, bad = CALLS[style], CALLS[style].replace("days", "weeks")
    with scripted(style, call, call, bad, "Hello", call) as (live, _):
        options = {"reasoning_effort": "none", "tools": [WEATHER, CLOCK]}
        for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
            answer = post(live, tool_choice=choice, **options).json()
            assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
        for wrong in ("weeks", "Hello"):
            answer = post(live, tool_choice="required", **options)
            assert answer.status_code == 400
            assert wrong in answer.json()["error"]["message"] or "the grammar forbids" in answer.text
        answer = post(live, tool_choice={"type": "function", "function": {"name": "clock"}}, **options)
        assert "the grammar forbids" in answer.json()["error"]["message"]


def test_a_call_that_must_come_after_thinking() -> None:
    with scripted("qwen3", f"<think>\nHmm</think>\n\n{CALLS['qwen3']}", CALLS["qwen3"]) as (live, _):
        message = post(live, tools=[WEATHER], tool_choice="required").json()["choices"][0]["message"]
        assert message["reasoning"] == "Hmm"
        assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Bonn", "days": 2}'
        # What may not end before it has thought may not call, either.
        assert post(live, tools=[WEATHER], tool_choice="required").status_code == 400


def test_parallel_calls() -> None:
    two = f"Both:\n{CALLS['qwen3']}\n{CALLS['qwen3']}"
    with scripted("hermes", two, two, CALLS["qwen3"] * 2) as (live, engine):
        calls = post(live, tools=[WEATHER]).json()["choices"][0]["message"]["tool_calls"]
        assert len(calls) == 2
        assert calls[0]["id"] != calls[1]["id"]
        engine.pause = 0.002  # so that it has not said all before it is stopped
        choice = post(live, tools=[WEATHER], parallel_tool_calls=False).json()["choices"][0]
        assert len(choice["message"]["tool_calls"]) == 1
        assert choice["finish_reason"] == "tool_calls"
        live.wait(lambda: engine.finished == engine.asked[-1:])
        # Nothing stands between two calls that a grammar has let through but a line break.
        body = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
        assert "the grammar forbids" in post(live, **body).text


def test_a_strict_tool_is_held_to_its_schema() -> None:
    tool = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    texts = ("Just text.", f"A call.\n{CALLS['qwen3']}", CALLS["qwen3"].replace("days", "weeks"))
    with scripted("hermes", *texts) as (live, _):
        assert post(live, tools=[tool]).json()["choices"][0]["message"]["content"] == "Just text."
        message = post(live, tools=[tool]).json()["choices"][0]["message"]
        assert (message["content"], len(message["tool_calls"])) == ("A call.", 1)
        assert post(live, tools=[tool]).status_code == 400


def test_without_choice_there_are_no_tools() -> None:
    with scripted("hermes", CALLS["qwen3"]) as (live, engine):
        choice = post(live, tools=[WEATHER], tool_choice="none").json()["choices"][0]
        assert "get_weather" not in engine.prompt
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALLS["qwen3"], "stop")


@pytest.mark.parametrize("style", [*CALLS, "simple", "none"])
def test_calls_given_back(style: str) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "a\\"b"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "When?"}, {"type": "text", "text": "Now?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "Hmm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "noon"},
    ]
    with scripted(style, "Noon.") as (live, engine):
        assert post(live, messages=messages, tools=[CLOCK]).status_code == 200
        prompt = engine.prompt
    assert "When?\nNow?" in prompt
    assert "noon" in prompt
    # An object, not a string within a string.
    assert 'a"b' in prompt if style == "qwen3_coder" else '{"zone": "a\\"b"}' in prompt
    assert "clock" in prompt


def test_tools_for_templates_that_take_none() -> None:
    with scripted("simple", CALLS["qwen3"], "x") as (live, engine):
        messages = [{"role": "system", "content": "Be brief."}, *ASK["messages"]]
        choice = post(live, tools=[WEATHER], messages=messages).json()["choices"][0]
        assert engine.prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call")
        assert "get_weather" in engine.prompt
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


def test_the_parser_can_be_named() -> None:
    with scripted("hermes", CALLS["llama"], tool_parser="llama") as (live, _):
        assert post(live, tools=[WEATHER]).json()["choices"][0]["finish_reason"] == "tool_calls"


def test_a_message_goes_on() -> None:
    messages = [*ASK["messages"], {"role": "assistant", "content": "Once upon"}]
    with scripted("hermes", " a time", "x") as (live, engine):
        answer = post(live, messages=messages, continue_final_message=True)
        assert answer.json()["choices"][0]["message"]["content"] == " a time"
        assert engine.prompt.endswith("Once upon")
        answer = post(live, messages=messages, continue_final_message=True, add_generation_prompt=True)
        assert answer.status_code == 400


def test_n_and_seed_and_logprobs() -> None:
    with scripted("hermes", "one", "two", "one", "two", "😀") as (live, engine):
        body = post(live, n=2, seed=5, logprobs=True, top_logprobs=2).json()
        assert [choice["message"]["content"] for choice in body["choices"]] == ["one", "two"]
        assert [request.params.seed for request in engine.asked] == [5, 6]
        assert body["usage"]["prompt_tokens"] == len(engine.asked[0].prompt)
        content = body["choices"][0]["logprobs"]["content"]
        assert "".join(token["token"] for token in content) == "one"
        assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
        assert content[0]["logprob"] == -0.5
        assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -2.0]
        parts = chunks(live, n=2, logprobs=True)
        for i, text in enumerate(("one", "two")):
            mine = [choice for part in parts for choice in part["choices"] if choice["index"] == i]
            assert mine[0]["delta"]["role"] == "assistant"
            assert "".join(choice["delta"].get("content", "") for choice in mine) == text
            assert (
                "".join(t["token"] for choice in mine for t in (choice["logprobs"] or {"content": []})["content"])
                == text
            )
        content = post(live, logprobs=True).json()["choices"][0]["logprobs"]["content"]
        assert all(token["top_logprobs"] == [] for token in content)
        assert any(token["bytes"] is None for token in content)


def test_length_and_stop() -> None:
    with scripted("hermes", "one two three", "one two three", CALLS["qwen3"]) as (live, _):
        assert post(live, max_completion_tokens=1).json()["choices"][0]["finish_reason"] == "length"
        choice = post(live, stop=["tw"]).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("one ", "stop")
        choice = post(live, max_tokens=18, tools=[WEATHER], parallel_tool_calls=False).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"')


def tool_of(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: Input"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: Input should be a valid string; or: "),
        ({"reasoning_effort": "much"}, "reasoning_effort: Input should be 'none', 'minimal'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "'image_url'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs a text"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type: Input should be 'function'"),
        ({"tools": [WEATHER, {"type": "function"}]}, "tools[1].function: Field required"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice: Input should be 'none', 'auto' or 'required'; or: "),
        ({"tools": [WEATHER, WEATHER]}, "several of the name 'get_weather'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "no tool 'x'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"top_logprobs": 2}, "only with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "only with stream"),
        ({"continue_final_message": True}, "must be the assistant's"),
        ({"chat_template_kwargs": {"tokenize": False}}, "'tokenize' cannot be set"),
        ({"response_format": {"type": "json_schema"}}, "no schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, "nonsense"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs: must have one of"),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"grammar": "root ::= ("}, "not GBNF"),
        ({"grammar": "x", "json_schema": {}}, "does not go together"),
        ({"tools": [tool_of({"type": "string"})]}, "of type object"),
        ({"messages": [{"role": "user"}]}, r"messages[0].content: is missing"),
        ({"n": 0}, "n:"),
        ({"chat_template_kwargs": {"self": 1}}, "'self' cannot be set"),
        ({"tools": [tool_of({"properties": [1]})]}, "an object as properties"),
        ({"tools": [tool_of({"properties": {}, "required": 5})]}, "must require names"),
        ({"tools": [tool_of({"$ref": "#/$defs/a"})], "tool_choice": "required"}, "tools: the schema of 'f'"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_what_cannot_be_done(body: dict[str, Any], message: str, refusing: LiveServer) -> None:
    for streamed in (False, True):
        answer = post(refusing, **({"stream": True} if streamed else {}) | body)
        if streamed and "stream_options" in body:
            continue
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert message in error["message"]


@pytest.fixture(scope="module")
def refusing() -> Any:
    with scripted("hermes", *["never"] * 64) as (live, _):
        yield live


def test_unknown_fields_are_told() -> None:
    with scripted("hermes", "Hi") as (live, _):
        assert post(live, verbosity="low").headers["Warning"] == '299 gfxlm "ignored: verbosity"'


def test_unknown_fields_of_messages_and_tools_are_told_unless_they_are_null() -> None:
    messages = [
        {"role": "user", "content": "a", "weight": 1},
        {"role": "assistant", "content": "b", "refusal": None, "audio": None},
        {"role": "user", "content": "c"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "cache": 1}}]
    with scripted("hermes", "Hi") as (live, _):
        told = post(live, messages=messages, tools=tools, audio=None).headers["Warning"]
    assert told == '299 gfxlm "ignored: messages[0].weight, tools[0].function.cache"'


def test_who_leaves_ends_all_answers() -> None:
    with scripted("hermes", *["word " * 400] * 3) as (live, engine):
        engine.pause = 0.002
        with (
            live.client() as client,
            client.stream("POST", "/v1/chat/completions", json={**ASK, "n": 3, "stream": True}) as response,
        ):
            next(response.iter_lines())
        live.wait(lambda: len(engine.finished) == 3)
        live.wait(lambda: live.worker.live == 0)


def test_the_builtin_model_answers_as_generate_does(server: LiveServer, builtin: Any) -> None:
    model, tokenizer = builtin
    messages = [{"role": "user", "content": "def add(a, b):"}]
    text = post(server, messages=messages, max_tokens=12).json()["choices"][0]["message"]["content"]
    assert text == gfxlm.generate(model, tokenizer, "def add(a, b):", max_tokens=12)


def test_the_builtin_model_calls_as_it_must(server: LiveServer) -> None:
    colour = {"type": "string", "enum": ["red", "green"]}
    parameters = {
        "type": "object",
        "properties": {"colour": colour, "n": {"type": "integer", "maximum": 99, "minimum": 0}},
    }
    tool = {
        "type": "function",
        "function": {"name": "paint", "parameters": {**parameters, "required": ["colour", "n"]}},
    }
    body = {"tools": [tool], "tool_choice": "required", "temperature": 1.5, "seed": 1, "parallel_tool_calls": False}
    choice = post(server, max_tokens=100, **body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    arguments = json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
    assert arguments.keys() == {"colour", "n"}
    assert arguments["colour"] in ("red", "green")
