"""Server-sent events: text that goes out as it comes, with signs of life while nothing does."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gfxlm.server.connection import until_disconnect
from gfxlm.server.errors import as_api_error

DONE = "[DONE]"
_KEEP_ALIVE = b": keep-alive\n\n"

NamedEvent = tuple[str, str]  # an event's name and its data
Event = str | NamedEvent  # or data alone


def encoded(event: Event) -> bytes:
    """An event on the wire. Data is JSON, or else a word: it has no line breaks."""
    if isinstance(event, str):
        return f"data: {event}\n\n".encode()
    name, data = event
    return f"event: {name}\ndata: {data}\n\n".encode()


class EventStream(Response):
    """A response of events. Until the first of them, or a sign of life, is due, an error is an ordinary answer.

    Later it is an event, and the stream ends. The events are closed when the client goes.
    """

    def __init__(
        self, events: AsyncIterator[Event], path: str, keepalive_seconds: float, headers: Mapping[str, str]
    ) -> None:
        self._events, self._path, self._keepalive = events, path, keepalive_seconds
        self.background = None
        self.status_code = 200
        self.body = b""
        # Proxies that collect an answer before they pass it on would hold the text back.
        quick = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self.init_headers({"Content-Type": "text/event-stream; charset=utf-8"} | quick | dict(headers))
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._run(scope, send))
        gone = asyncio.ensure_future(until_disconnect(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, gone):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait((sending, gone))

    async def _run(self, scope: Scope, send: Send) -> None:
        output = _Output(send, self.raw_headers)
        pulse = asyncio.ensure_future(self._pulse(output))
        try:
            async for event in self._events:
                await output.write(encoded(event))
        except Exception as error:
            if not output.started:
                raise
            await output.write(self._failure(scope, error))
        finally:
            pulse.cancel()
            if aclose := getattr(self._events, "aclose", None):
                await aclose()
        await output.write(b"", last=True)

    async def _pulse(self, output: "_Output") -> None:
        """A comment whenever nothing was sent for a while."""
        silent = 0.0
        while True:
            await asyncio.sleep(self._keepalive - silent)
            silent = time.monotonic() - output.last
            if silent >= self._keepalive:
                await output.write(_KEEP_ALIVE)
                silent = 0.0

    def _failure(self, scope: Scope, error: Exception) -> bytes:
        answer = as_api_error(error)
        scope["state"]["error"] = answer.message  # for the log: the status line has gone out
        body = answer.body(self._path, scope["state"].get("request_id"))
        return encoded(("error", json.dumps(body)) if "type" in body else json.dumps(body))


class _Output:
    """Where two write in turn: events, and signs of life."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send, self._headers = send, headers
        self._turn = asyncio.Lock()
        self.started = False
        self.last = time.monotonic()  # when something was written

    async def write(self, chunk: bytes, *, last: bool = False) -> None:
        async with self._turn:
            if not self.started:
                await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
                self.started = True
            await self._send({"type": "http.response.body", "body": chunk, "more_body": not last})
            self.last = time.monotonic()


def stream(
    events: AsyncIterator[Event], request: Request, keepalive_seconds: float, headers: Mapping[str, str] | None = None
) -> EventStream:
    """The response that sends these events, and keep-alive comments where none comes for so many seconds."""
    return EventStream(events, request.url.path, keepalive_seconds, headers or {})
