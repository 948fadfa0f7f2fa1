"""How much a client may send."""

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gfxlm.server.errors import ApiError

# What is read of a refused body, and dropped: who closes on unread data resets the connection, and the answer is lost.
_DROPPED_BYTES = 64 << 20
_DROPPING_SECONDS = 10.0


class BodyLimit:
    """Refuses a body that is too large, by its announced length or as it comes, and answers before all of it is there.

    The connection is closed behind the answer, once the client has sent the rest, or enough of it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._most = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        announced = int(length) if length.isdigit() else 0
        received = 0
        refused = whole = False

        async def counted() -> Message:
            nonlocal received, refused, whole
            if announced <= self._most:
                message = await receive()
                received += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if received <= self._most:
                    return message
            else:
                whole = b"expect" in headers  # nobody has told the client to go on, so nothing comes
            refused = True
            raise self._refusal()

        async def answered(message: Message) -> None:
            if not refused or whole or message["type"] != "http.response.body" or message.get("more_body"):
                await send(message)
                return
            await send({**message, "more_body": True})
            await _drop(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, counted, answered)

    def _refusal(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._most} bytes, which is the limit (--max-body-size)",
            headers={"Connection": "close"},
        )


async def _drop(receive: Receive) -> None:
    """Read what is left of a body, up to the bounds."""
    dropped = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DROPPING_SECONDS):
            while dropped < _DROPPED_BYTES:
                message = await receive()
                if not message.get("more_body", False):
                    return
                dropped += len(message["body"])
