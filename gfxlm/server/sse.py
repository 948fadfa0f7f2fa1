"""Server-sent events: text that goes out as it comes, with signs of life while nothing does."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gfxlm.server.connection import until_disconnect
from gfxlm.server.errors import as_api_error

DONE = "[DONE]"
_KEEP_ALIVE = b": keep-alive\n\n"

Event = str | tuple[str, str]  # data, or an event's name and its data


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
        started = False
        try:
            async for chunk in self._chunks():
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": self._failure(scope, error), "more_body": True})
        if not started:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        """Events, and comments where there was none for a while."""
        next_event = asyncio.ensure_future(anext(self._events))
        try:
            while True:
                done, _ = await asyncio.wait((next_event,), timeout=self._keepalive)
                if not done:
                    yield _KEEP_ALIVE
                    continue
                try:
                    event = next_event.result()
                except StopAsyncIteration:
                    return
                yield encoded(event)
                next_event = asyncio.ensure_future(anext(self._events))
        finally:
            next_event.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait((next_event,))
            if aclose := getattr(self._events, "aclose", None):
                await aclose()

    def _failure(self, scope: Scope, error: Exception) -> bytes:
        answer = as_api_error(error)
        scope["state"]["error"] = answer.message  # for the log: the status line has gone out
        body = answer.body(self._path, scope["state"].get("request_id"))
        return encoded(("error", json.dumps(body)) if "type" in body else json.dumps(body))


def stream(
    events: AsyncIterator[Event], request: Request, keepalive_seconds: float, headers: Mapping[str, str] | None = None
) -> EventStream:
    """The response that sends these events, and keep-alive comments where none comes for so many seconds."""
    return EventStream(events, request.url.path, keepalive_seconds, headers or {})
