"""/tokenize and /detokenize."""

from typing import Any

import httpx
import pytest

from tests.server.conftest import LiveServer

TEXT = "def add(a, b):  # ü"


def post(server: LiveServer, path: str, **body: Any) -> httpx.Response:
    with server.client() as client:
        return client.post(path, json=body)


def test_text_becomes_tokens_and_text_again(server: LiveServer) -> None:
    tokenizer = server.worker.tokenizer
    plain = tokenizer.encode(TEXT, add_special_tokens=False)
    answer = post(server, "/tokenize", content=TEXT).json()
    assert answer == {"tokens": plain, "count": len(plain), "max_model_len": 2048}
    # vLLM's prompt is what /v1/completions would see.
    assert post(server, "/tokenize", prompt=TEXT).json()["tokens"] == tokenizer.encode(TEXT)
    assert post(server, "/tokenize", content=TEXT, add_special=True).json()["tokens"] == tokenizer.encode(TEXT)
    assert post(server, "/tokenize", prompt=TEXT, add_special_tokens=False).json()["tokens"] == plain
    assert post(server, "/detokenize", tokens=plain).json() == {"content": TEXT, "prompt": TEXT}
    assert post(server, "/tokenize", content="").json()["tokens"] == []
    assert post(server, "/detokenize", tokens=[]).json()["content"] == ""


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"content": "a", "prompt": "b"}),
        ("/tokenize", {"content": 1}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
def test_what_cannot_be_is_a_400(server: LiveServer, path: str, body: dict[str, Any]) -> None:
    assert post(server, path, **body).status_code == 400


def test_a_chat_has_the_tokens_that_its_answer_goes_on_from(server: LiveServer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    for extras in ({}, {"tools": tools}):
        tokens = post(server, "/tokenize", messages=messages, **extras).json()["tokens"]
        assert "1 + 1" in server.worker.tokenizer.decode(tokens)
        answer = post(server, "/v1/chat/completions", messages=messages, max_tokens=1, **extras).json()
        assert answer["usage"]["prompt_tokens"] == len(tokens)
