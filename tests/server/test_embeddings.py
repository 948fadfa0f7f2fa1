"""/v1/embeddings, by the official client too."""

import base64
import math
import struct
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from gfxlm.server.registry import ModelSpec
from tests.server.conftest import LiveServer, serving


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def post(server: LiveServer, **body: Any) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/embeddings", json=body)


def test_each_input_has_a_vector_of_length_one(client: openai.OpenAI, server: LiveServer) -> None:
    answer = client.embeddings.create(model="builtin", input=["import os", "def f():"], encoding_format="float")
    assert [item.index for item in answer.data] == [0, 1]
    for item in answer.data:
        assert len(item.embedding) == server.worker.hidden_size
        assert math.hypot(*item.embedding) == pytest.approx(1, abs=1e-5)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 2
    alone = client.embeddings.create(model="builtin", input="def f():", encoding_format="float")
    assert alone.data[0].embedding == pytest.approx(answer.data[1].embedding, abs=1e-5)


def test_base64_is_the_same_numbers(client: openai.OpenAI, server: LiveServer) -> None:
    numbers = post(server, input="import os").json()["data"][0]["embedding"]
    text = post(server, input="import os", encoding_format="base64").json()["data"][0]["embedding"]
    assert list(struct.unpack(f"<{len(numbers)}f", base64.b64decode(text))) == pytest.approx(numbers)
    # The client asks for base64 by itself.
    assert client.embeddings.create(model="builtin", input="import os").data[0].embedding == pytest.approx(numbers)


def test_tokens_and_pooling(server: LiveServer) -> None:
    tokens = server.worker.tokenizer.encode("import os")
    vectors = [post(server, input=prompt).json()["data"][0]["embedding"] for prompt in ("import os", tokens, [tokens])]
    assert vectors[0] == vectors[1] == vectors[2]
    assert post(server, input="import os", pooling="last").json()["data"][0]["embedding"] != vectors[0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [5] * 2049}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": ["a"] * 2049}, "input"),
    ],
)
def test_what_cannot_be_is_a_400(server: LiveServer, body: dict[str, Any], param: str) -> None:
    response = post(server, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_what_takes_too_long_is_a_504(make_spec: Callable[..., ModelSpec]) -> None:
    with serving([make_spec()], request_timeout=0.02) as live:
        assert post(live, input=["import os " * 100] * 50).status_code == 504
        live.wait(lambda: live.worker.live == 0)
