"""What every route has in common: errors, keys, limits, ids, other origins."""

import http.client
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from gfxlm import __version__
from gfxlm.server.registry import ModelSpec
from tests.server.conftest import LiveServer, serving

KEYS = ("sk-first", "sk-sécond")
ORIGIN = "https://page.example"


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def guarded(make_spec: Callable[..., ModelSpec]) -> Iterator[LiveServer]:
    """A server with keys, a small body limit, and one origin that may ask."""
    with serving([make_spec()], api_keys=KEYS, allowed_origins=(ORIGIN,), max_body_size=2000) as live:
        yield live


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "prompt"),
        ({"prompt": 1}, "prompt", "string"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [[]]}, "prompt", "at least 1"),
        ({"prompt": [1.5]}, "prompt", "integer"),
        ({"prompt": [10**6]}, "prompt", "vocabulary has"),
        ({"prompt": [-1]}, "prompt", "vocabulary has"),
        ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "a", "n": 1000}, "n", "128"),
        ({"prompt": ["a"] * 100, "n": 2}, "n", "at most 128"),
        ({"prompt": "a", "stream": "yes"}, "stream", "boolean"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"prompt": "a", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "top_p": 2}, "top_p", "less than or equal to 1"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "20"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "logit_bias.x: Input should be a valid integer"),
        ({"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias", "no token"),
        ({"prompt": "a", "stop": [""]}, "stop", "not empty"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format", "no schema"),
        ({"prompt": "a", "structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "best_of": 2}, "best_of", "not supported"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo", "not supported"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(client: httpx.Client, body: dict[str, Any], param: str, says: str) -> None:
    error = error_of(client.post("/v1/completions", json=body), 400)
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": ',
        "",
        "[]",
        '"text"',
        '{"prompt": "\\ud800"}',
        '{"prompt": "a", "x": {"\\udfff": 1}}',
        '{"prompt": NaN}',
        '{"prompt": ' + "[" * 900 + "]" * 900 + "}",
        '{"prompt": ' + "[" * 10**5 + "]" * 10**5 + "}",
    ],
    ids=lambda text: text[:40],
)
def test_a_malformed_body_is_a_400(client: httpx.Client, text: str) -> None:
    headers = {"Content-Type": "application/json"}
    error_of(client.post("/v1/completions", content=text, headers=headers), 400)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"prompt": "\xff"}', "can't decode byte"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"prompt": ' + b"[" * 10**5, "recursion"),
    ],
    ids=["not UTF-8", "a long number", "deep"],
)
def test_a_body_that_cannot_be_parsed_says_why(client: httpx.Client, text: bytes, says: str) -> None:
    headers = {"Content-Type": "application/json"}
    message = error_of(client.post("/v1/completions", content=text, headers=headers), 400)["message"]
    assert message.startswith("the body is not valid JSON: ")
    assert says in message
    assert "sys." not in message


def test_a_body_of_another_type_is_told_what_is_wanted(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/completions", data={"prompt": "a"}), 400)
    assert "'Content-Type: application/json', not as application/x-www-form-urlencoded" in error["message"]


def test_a_prompt_that_does_not_fit_says_so(server: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="builtin", prompt=[5] * 2049)
    assert caught.value.code == "context_length_exceeded"
    assert "2049 tokens, but the context holds 2048" in caught.value.message


def test_what_only_the_sampler_knows_to_be_impossible_is_a_400_too(client: httpx.Client) -> None:
    body = {"prompt": "a", "repetition_penalty": 1.1, "repetition_context_size": 10**6}
    assert "at most 1024" in error_of(client.post("/v1/completions", json=body), 400)["message"]
    assert client.post("/v1/completions", json={**body, "stream": True}).status_code == 400


def test_unknown_models_paths_and_methods(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": "a", "model": "nope"}), 404)
    assert error["code"] == "model_not_found"
    assert "there is builtin" in error["message"]
    assert error_of(client.get("/v1/models/nope"), 404)["param"] == "model"
    assert "/nope" in error_of(client.get("/nope"), 404)["message"]
    response = client.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_models_are_listed_under_names_and_aliases(client: httpx.Client, server: LiveServer) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["builtin"]
    assert listed["data"][0] | {"created": 0} == {
        "id": "builtin",
        "object": "model",
        "created": 0,
        "owned_by": "gfxlm",
        "loaded": True,
        "max_model_len": 2048,
    }
    for name in ("builtin", "alias", "default"):
        assert client.get(f"/v1/models/{name}").json() == listed["data"][0]
    ours = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in ours.models.list()] == ["builtin"]


def test_health_and_version(client: httpx.Client) -> None:
    for path in ("/health", "/v1/health"):
        assert client.get(path).json() == {"status": "ok"}
        assert client.head(path).status_code == 200
    assert client.get("/version").json() == {"version": __version__}


def test_ids_are_the_clients_own_or_made(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = [
        client.get("/nope", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 200)
    ]
    assert all(name.startswith("req_") for name in made)
    assert len(set(made)) == 3


def test_all_but_health_and_the_page_wants_a_key(guarded: LiveServer) -> None:
    with guarded.client() as client:
        for path in ("/health", "/v1/health", "/", "/page/main.js"):
            assert client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nope"):
            response = client.get(path)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for wrong in ("x", "sk-", "sk-firs", "sk-first2", "sk-FIRST"):
            error_of(client.get("/v1/models", headers={"Authorization": f"Bearer {wrong}"}), 401)
        error_of(client.get("/v1/models", headers={"Authorization": "Basic sk-first"}), 401)
        for key in KEYS:
            for headers in ({"Authorization": f"Bearer {key}"}, {"authorization": f"bearer {key}"}, {"x-api-key": key}):
                encoded = {name: value.encode() for name, value in headers.items()}
                assert client.get("/v1/models", headers=encoded).status_code == 200


def test_the_official_client_knows_a_refusal(guarded: LiveServer) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_anthropics_routes_have_anthropics_errors(guarded: LiveServer) -> None:
    with guarded.client() as client:
        response = client.post("/v1/messages", json={})
    assert response.status_code == 401
    answer = response.json()
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "authentication_error"
    assert answer["request_id"] == response.headers["x-request-id"] == response.headers["request-id"]


def test_only_named_origins_may_ask(guarded: LiveServer, client: httpx.Client) -> None:
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with guarded.client() as theirs:
        allowed = theirs.options("/v1/completions", headers={"Origin": ORIGIN, **preflight})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        other = theirs.options("/v1/completions", headers={"Origin": "https://other.example", **preflight})
        assert "access-control-allow-origin" not in other.headers
        # A page must be able to read why it was refused.
        refused = theirs.get("/v1/models", headers={"Origin": ORIGIN})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": ORIGIN}).headers


def test_a_body_that_is_too_large_is_refused_before_it_is_read(guarded: LiveServer) -> None:
    headers = {"Authorization": "Bearer sk-first"}
    with guarded.client(headers=headers) as client:
        assert client.post("/v1/completions", json={"prompt": "a", "user": "x" * 1500}).status_code == 200
        error = error_of(client.post("/v1/completions", json={"prompt": "x" * 2000}), 413)
        assert "2000 bytes" in error["message"]
    # An announced length is believed, and not waited for.
    connection = http.client.HTTPConnection(guarded.url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/v1/completions")
    for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(10**12)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_of_unknown_length_is_cut_off_where_it_is_too_large(guarded: LiveServer) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * 100

    headers = {"Authorization": "Bearer sk-first", "Content-Type": "application/json"}
    with guarded.client(headers=headers) as client:
        error_of(client.post("/v1/completions", content=endless()), 413)


def test_a_line_is_logged_for_each_request_and_never_the_text(
    client: httpx.Client, server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    def logged_of(*ids: str) -> list[dict[str, Any]]:
        entries = [record.__dict__["fields"] for record in caplog.records]
        return [entry for entry in entries if entry["id"] in ids]

    with caplog.at_level(logging.DEBUG, "gfxlm.server.requests"):
        answer = client.post(
            "/v1/completions", json={"prompt": "a secret", "n": 2, "user": "a secret"}, headers={"x-request-id": "id-7"}
        )
        client.get("/v1/models/a-secret", headers={"x-request-id": "id-8"})
        server.wait(lambda: len(logged_of("id-7", "id-8")) == 2)  # a line comes after its answer
    text = answer.json()["choices"][0]["text"]
    first, second = logged_of("id-7", "id-8")
    assert first["id"] == "id-7"
    assert (first["method"], first["route"], first["status"], first["model"]) == (
        "POST",
        "/v1/completions",
        200,
        "builtin",
    )
    assert first["generated_tokens"] == 32
    assert first["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert (second["route"], second["status"]) == ("/v1/models/{model:path}", 404)
    logged = json.dumps([first, second])
    assert "secret" not in logged
    assert text not in logged


def test_prompts_are_logged_where_that_is_wanted(
    make_spec: Callable[..., ModelSpec], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "gfxlm.server.requests"),
        serving([make_spec()], log_prompts=True) as live,  # whose end waits for the line
        live.client() as client,
    ):
        client.post("/v1/completions", json={"prompt": "a secret", "max_tokens": 1})
    assert "a secret" in caplog.records[-1].__dict__["fields"]["body"]
