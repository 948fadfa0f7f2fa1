import json
from typing import Any

import httpx
import openai
import pytest
import torch

from gfxlm import generate
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.models.base import CausalLM
from tests.server.conftest import LiveServer

PROMPT = "def add(a, b):"


def ask(server: LiveServer, **body: Any) -> dict[str, Any]:
    with server.client() as client:
        response = client.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def test_text_equals_generate_streaming_and_not(client: openai.OpenAI, builtin: tuple[CausalLM, Tokenizer]) -> None:
    expected = generate(*builtin, PROMPT, max_tokens=24)
    whole = client.completions.create(model="builtin", prompt=PROMPT, max_tokens=24)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.id.startswith("cmpl-")
    assert whole.object == "text_completion"
    stream = client.completions.create(model="builtin", prompt=PROMPT, max_tokens=24, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_prompts_come_as_text_and_as_tokens_one_and_many(
    server: LiveServer, builtin: tuple[CausalLM, Tokenizer]
) -> None:
    tokens = builtin[1].encode(PROMPT)
    other = builtin[1].encode("import")
    alone = [ask(server, prompt=prompt)["choices"][0]["text"] for prompt in (PROMPT, "import")]
    assert ask(server, prompt=tokens)["choices"][0]["text"] == alone[0]
    for prompts in ([PROMPT, "import"], [tokens, other]):
        choices = ask(server, prompt=prompts)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert [choice["text"] for choice in choices] == alone


def test_n_texts_differ_by_seed_and_are_repeatable(server: LiveServer) -> None:
    first = ask(server, n=3, temperature=1.5, seed=7)
    texts = [choice["text"] for choice in first["choices"]]
    assert len(set(texts)) > 1
    assert [choice["text"] for choice in ask(server, n=3, temperature=1.5, seed=7)["choices"]] == texts
    assert ask(server, temperature=1.5, seed=8)["choices"][0]["text"] == texts[1]
    prompt = first["usage"]["prompt_tokens"]
    assert first["usage"]["completion_tokens"] == 48
    assert first["usage"]["total_tokens"] == prompt + 48


def test_echo_puts_the_prompt_first(server: LiveServer) -> None:
    plain = ask(server)["choices"][0]["text"]
    assert ask(server, echo=True)["choices"][0]["text"] == PROMPT + plain
    with server.client() as client:
        response = client.post("/v1/completions", json={"prompt": PROMPT, "echo": True, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks(response)) == PROMPT + plain


def test_logprobs_are_those_of_the_model(server: LiveServer, builtin: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = builtin
    answer = ask(server, logprobs=3, max_tokens=4)["choices"][0]
    found = answer["logprobs"]
    tokens = tokenizer.encode(PROMPT)
    logits = model(torch.tensor([tokens]))[0, -1].double()
    expected = torch.log_softmax(logits, -1)
    best = expected.topk(3)
    assert found["token_logprobs"][0] == pytest.approx(best.values[0].item(), abs=1e-2)
    assert list(found["top_logprobs"][0].values()) == pytest.approx(best.values.tolist(), abs=1e-2)
    assert list(found["top_logprobs"][0]) == [tokenizer.decode([token]) for token in best.indices.tolist()]
    assert "".join(found["tokens"]) == answer["text"]
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(4)]
    assert all(len(top) == 3 for top in found["top_logprobs"])


def test_streamed_logprobs_are_the_same(server: LiveServer) -> None:
    whole = ask(server, logprobs=2)["choices"][0]["logprobs"]
    with server.client() as client:
        response = client.post("/v1/completions", json={"prompt": PROMPT, "logprobs": 2, "stream": True})
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks(response)]
    for name in ("tokens", "text_offset"):
        assert [value for part in parts for value in part[name]] == whole[name]


def test_a_stop_string_ends_the_text_before_it(server: LiveServer) -> None:
    plain = ask(server)["choices"][0]["text"]
    stop = plain[5:8]
    answer = ask(server, stop=[stop, "never"])["choices"][0]
    assert answer["text"] == plain[: plain.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_logit_bias_bans_and_ignore_eos_goes_on(server: LiveServer, builtin: tuple[CausalLM, Tokenizer]) -> None:
    tokenizer = builtin[1]
    first = ask(server, logprobs=0, max_tokens=1)["choices"][0]["logprobs"]["tokens"][0]
    token = tokenizer.encode(first, add_special_tokens=False)[0]
    assert ask(server, logit_bias={str(token): -100}, max_tokens=1)["choices"][0]["text"] != first
    eos = next(iter(tokenizer.eos_token_ids))
    forced = {"logit_bias": {str(eos): 100}, "max_tokens": 5}
    assert ask(server, **forced)["choices"][0]["finish_reason"] == "stop"
    assert ask(server, **forced)["usage"]["completion_tokens"] == 1
    ignored = ask(server, **forced, ignore_eos=True)
    assert (ignored["choices"][0]["finish_reason"], ignored["usage"]["completion_tokens"]) == ("length", 5)


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="builtin", prompt=[PROMPT, "import"], stream=True, max_tokens=4, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert not last.choices
    assert last.usage is not None
    assert last.usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks)
    ends = [chunk.choices[0] for chunk in chunks if chunk.choices[0].finish_reason]
    assert sorted(choice.index for choice in ends) == [0, 1]


def test_timings_have_llama_cpps_names(server: LiveServer) -> None:
    timings = ask(server)["timings"]
    assert timings["predicted_n"] == 16
    assert timings["prompt_n"] + timings["cache_n"] == ask(server)["usage"]["prompt_tokens"]
    assert timings["predicted_ms"] > 0
    assert timings["predicted_per_second"] == pytest.approx(15 / timings["predicted_ms"] * 1e3)


def test_unknown_fields_are_told_and_change_nothing(server: LiveServer) -> None:
    with server.client() as client:
        body = {"prompt": PROMPT, 'naïve\n"': 1, "foo": 2, "stream_options": {"bar": 1}, "stream": True}
        streamed = client.post("/v1/completions", json=body)
        plain = client.post("/v1/completions", json={"prompt": PROMPT})
    assert streamed.headers["warning"] == '299 gfxlm "ignored: na?ve??, foo, stream_options.bar"'
    assert "warning" not in plain.headers
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks(streamed))
    assert text == plain.json()["choices"][0]["text"]


def test_a_text_has_the_form_that_is_asked_for(server: LiveServer) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    body = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    answer = ask(server, **body, max_tokens=64, temperature=1, seed=1)["choices"][0]
    assert json.loads(answer["text"])["a"] in (1, 2)
    assert answer["finish_reason"] == "stop"
    choice = ask(server, structured_outputs={"choice": ["yes", "no"]})["choices"][0]["text"]
    assert choice in ("yes", "no")


def test_a_text_has_min_tokens_at_least(server: LiveServer, builtin: tuple[CausalLM, Tokenizer]) -> None:
    (end,) = builtin[1].eos_token_ids
    soon = {"logit_bias": {str(end): 100}, "max_tokens": 12}  # it ends as early as it may
    for least, tokens in ((0, 0), (1, 1), (5, 5)):
        answer = ask(server, min_tokens=least, logprobs=0, **soon)
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == tokens
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == tokens + 1
    assert ask(server, min_tokens=12, **soon)["choices"][0]["finish_reason"] == "length"
    free = ask(server, max_tokens=12, ignore_eos=True)["choices"][0]["text"]
    assert ask(server, max_tokens=12, min_tokens=4, ignore_eos=True)["choices"][0]["text"] == free


def test_stop_strings_count_behind_min_tokens(server: LiveServer) -> None:
    logprobs = ask(server, max_tokens=12, ignore_eos=True, logprobs=0)["choices"][0]["logprobs"]
    tokens = logprobs["tokens"]
    options = {"max_tokens": 12, "ignore_eos": True, "stop": tokens[2]}
    assert "".join(tokens).index(tokens[2]) < len("".join(tokens[:4]))
    answer = ask(server, min_tokens=4, **options)["choices"][0]
    assert answer["text"].startswith("".join(tokens[:4]))
    assert len(ask(server, **options)["choices"][0]["text"]) < len(answer["text"])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"min_tokens": 20, "max_tokens": 10}, "more than max_tokens, 10"),
        ({"min_tokens": -1}, "greater than or equal to 0"),
        ({"min_tokens": 2, "grammar": 'root ::= "a"'}, "does not go with structured output"),
    ],
)
def test_min_tokens_that_cannot_be(server: LiveServer, body: dict[str, Any], says: str) -> None:
    with server.client() as client:
        response = client.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "min_tokens"
