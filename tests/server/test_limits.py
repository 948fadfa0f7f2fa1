"""A body that is too large: whoever sends it sees the answer, and cannot make the server read for ever."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from gfxlm.server import limits
from gfxlm.server.registry import ModelSpec
from tests.server.conftest import LiveServer, serving

MOST = 2000
MUCH = 16 << 20  # more than the sockets between client and server hold


@pytest.fixture(scope="module")
def live(make_spec: Callable[..., ModelSpec]) -> Iterator[LiveServer]:
    with serving([make_spec()], max_body_size=MOST) as server:
        yield server


def connected(live: LiveServer, *headers: str) -> socket.socket:
    """A connection on which a request has begun."""
    host, _, port = live.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    lines = ["POST /v1/completions HTTP/1.1", "Host: test", "Content-Type: application/json", *headers]
    connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    return connection


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def test_who_sends_all_before_reading_sees_the_answer(live: LiveServer) -> None:
    with connected(live, f"Content-Length: {MUCH}") as connection:
        connection.sendall(b"x" * MUCH)
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()
    assert b"larger than 2000 bytes" in answer


def test_a_body_in_chunks_does_too(live: LiveServer) -> None:
    with connected(live, "Transfer-Encoding: chunked") as connection:
        for _ in range(MUCH >> 16):
            connection.sendall(chunk(b"x" * (1 << 16)))
        connection.sendall(chunk(b""))
        assert all_of(connection).startswith(b"HTTP/1.1 413 ")


def test_the_answer_does_not_wait_for_the_body(live: LiveServer) -> None:
    with connected(live, f"Content-Length: {MUCH}") as connection:
        connection.sendall(b"x" * MOST)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_who_asks_first_is_told_at_once_and_sends_nothing(live: LiveServer) -> None:
    begun = time.monotonic()
    with connected(live, f"Content-Length: {MUCH}", "Expect: 100-continue") as connection:
        assert all_of(connection).startswith(b"HTTP/1.1 413 ")
    assert time.monotonic() - begun < 5


def test_who_asks_first_and_sends_chunks_is_told_as_it_is_too_much(live: LiveServer) -> None:
    with connected(live, "Transfer-Encoding: chunked", "Expect: 100-continue") as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        connection.sendall(chunk(b"x" * (MOST + 1)) + chunk(b""))
        assert all_of(connection).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_neither_sends_nor_goes_is_left(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_DROPPING_SECONDS", 0.2)
    with connected(live, f"Content-Length: {MUCH}") as connection:
        assert all_of(connection).startswith(b"HTTP/1.1 413 ")


def test_an_endless_body_is_left(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_DROPPED_BYTES", MUCH)
    part = chunk(b"x" * (1 << 16))
    with connected(live, "Transfer-Encoding: chunked") as connection, pytest.raises(ConnectionError):  # noqa: PT012
        while True:
            connection.sendall(part)
