"""Streams: signs of life, errors on the way, clients that leave or do not read."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from gfxlm.server.errors import ApiError
from gfxlm.server.registry import ModelSpec
from gfxlm.server.sse import Event, encoded, stream
from tests.server.conftest import LiveServer, serving

ENDLESS = {"prompt": "import os", "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def narrow(make_spec: Callable[..., ModelSpec]) -> Iterator[LiveServer]:
    """One request at a time, and one that waits."""
    spec = make_spec(max_concurrency=1)
    with serving([spec], max_concurrency=1, max_queue=1, keepalive_seconds=0.05) as live:
        yield live


def sent(events: AsyncIterator[Event], *, path: str = "/", disconnect: bool = False) -> list[Message]:
    """What a response of these events sends to a client that stays, or goes at once."""
    messages: list[Message] = []

    async def run() -> None:
        async def receive() -> Message:
            if not disconnect:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            messages.append(message)

        scope = {"type": "http", "path": path, "headers": [], "state": {}, "query_string": b"", "server": ("x", 1)}
        response = stream(events, Request(scope), 0.02, {"X-More": "1"})
        await asyncio.wait_for(response(scope, receive, send), 5)

    asyncio.run(run())
    return messages


def test_events_on_the_wire() -> None:
    assert encoded("{}") == b"data: {}\n\n"
    assert encoded(("ping", "{}")) == b"event: ping\ndata: {}\n\n"


def test_silence_is_filled_with_comments() -> None:
    async def events() -> AsyncIterator[Event]:
        await asyncio.sleep(0.07)
        yield "1"
        yield ("named", "2")

    start, *bodies = sent(events())
    assert start["status"] == 200
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"x-more"] == b"1"
    assert b"content-length" not in headers
    text = b"".join(body["body"] for body in bodies)
    assert text.count(b": keep-alive\n\n") >= 2
    assert text.replace(b": keep-alive\n\n", b"") == b"data: 1\n\nevent: named\ndata: 2\n\n"
    assert [body["more_body"] for body in bodies][-1] is False


def test_an_error_before_anything_was_sent_is_an_answer() -> None:
    async def events() -> AsyncIterator[Event]:
        raise ApiError(504, "late")
        yield ""

    with pytest.raises(ApiError, match="late"):
        sent(events())


@pytest.mark.parametrize(
    ("path", "start"), [("/v1/completions", b'data: {"error": '), ("/v1/messages", b'event: error\ndata: {"type": ')]
)
@pytest.mark.parametrize("error", [ApiError(504, "late"), ZeroDivisionError()])
def test_an_error_on_the_way_is_an_event(path: str, start: bytes, error: Exception) -> None:
    async def events() -> AsyncIterator[Event]:
        yield "1"
        raise error

    bodies = b"".join(message.get("body", b"") for message in sent(events(), path=path))
    first, second, rest = bodies.split(b"\n\n")
    assert first == b"data: 1"
    assert second.startswith(start)
    assert rest == b""


def test_events_are_closed_when_the_client_goes() -> None:
    closed = False

    async def events() -> AsyncIterator[Event]:
        nonlocal closed
        try:
            await asyncio.sleep(60)
            yield ""
        finally:
            closed = True

    sent(events(), disconnect=True)
    assert closed


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_gives_up_its_slot(narrow: LiveServer, streaming: bool) -> None:
    worker = narrow.worker
    with narrow.client(timeout=httpx.Timeout(5, read=0.3)) as client:
        try:
            with client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": streaming}) as response:
                next(response.iter_lines())
        except httpx.ReadTimeout:
            assert not streaming
    narrow.wait(lambda: worker.live == 0)
    narrow.wait(lambda: worker.running == 0)
    steps = worker.steps
    time.sleep(0.05)
    assert worker.steps == steps


def test_a_full_queue_is_a_429_that_says_when_to_come_again(narrow: LiveServer) -> None:
    body = {**ENDLESS, "stream": True}
    with narrow.client() as client, client.stream("POST", "/v1/completions", json=body) as first:
        running = first.iter_lines()  # which, dropped, would close the stream
        assert next(running).startswith("data: ")
        with client.stream("POST", "/v1/completions", json=body) as second:
            waiting = second.iter_lines()
            assert next(waiting) == ": keep-alive"
            response = client.post("/v1/completions", json={"prompt": "a"})
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "rate_limit_error"
    narrow.wait(lambda: narrow.worker.live == 0)


def test_n_texts_that_do_not_all_fit_leave_nothing_behind(narrow: LiveServer) -> None:
    with narrow.client() as client:
        with client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as first:
            running = first.iter_lines()  # which, dropped, would close the stream
            assert next(running).startswith("data: ")
            assert client.post("/v1/completions", json={"prompt": "a", "n": 2}).status_code == 429
        narrow.wait(lambda: narrow.worker.live == 0)


def test_more_texts_than_ever_fit_are_a_400(narrow: LiveServer) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "n": 3}
    with narrow.client() as client:
        for path, body in (("completions", {"prompt": "a", "n": 3}), ("chat/completions", chat)):
            response = client.post(f"/v1/{path}", json=body)
            assert response.status_code == 400
            assert "at most 2" in response.json()["error"]["message"]
            assert response.json()["error"]["param"] == "n"


def test_a_deadline_before_anything_was_sent_is_a_504(server: LiveServer) -> None:
    with server.client() as client:
        response = client.post("/v1/completions", json={**ENDLESS, "timeout": 0.05})
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "timeout_error"


def test_a_deadline_on_the_way_is_an_event_and_the_end(server: LiveServer) -> None:
    with server.client() as client:
        response = client.post("/v1/completions", json={**ENDLESS, "timeout": 0.3, "stream": True})
    assert response.status_code == 200
    *chunks, last = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert chunks
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"


def test_a_client_that_does_not_read_slows_nobody(server: LiveServer) -> None:
    """Its socket is full, its text waits, and the others go on."""
    body = json.dumps({**ENDLESS, "max_tokens": 400, "stream": True, "logprobs": 20}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(request)
        server.wait(lambda: server.worker.running == 1)
        with server.client() as client:
            for _ in range(5):
                answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 8})
                assert answer.status_code == 200
        assert server.worker.running == 1
        server.wait(lambda: server.worker.live == 0, 60)  # it was generated to its end, unread
        received = b""
        slow.settimeout(10)
        while not received.endswith(b"0\r\n\r\n"):
            part = slow.recv(1 << 16)
            assert part
            received += part
    assert b"data: [DONE]" in received
    assert b'"finish_reason": "length"' in received


def test_warnings_and_ids_come_with_streams(server: LiveServer) -> None:
    with server.client() as client:
        body: dict[str, Any] = {"prompt": "a", "stream": True, "nonsense": 1}
        response = client.post("/v1/completions", json=body)
    assert "nonsense" in response.headers["warning"]
    assert response.headers["x-request-id"].startswith("req_")
