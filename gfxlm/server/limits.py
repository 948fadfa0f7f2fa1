"""How much a client may send."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gfxlm.server.errors import ApiError


class BodyLimit:
    """Refuses a body that is too large before it is read whole: by its announced length, or as it comes."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._most = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            raise self._refusal()
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most:
                raise self._refusal()
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._most} bytes, which is the limit (--max-body-size)",
            headers={"Connection": "close"},  # what is left of it will not be read
        )
