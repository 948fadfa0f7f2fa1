"""Who is at the other end, and whether anybody still is."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from gfxlm.server.errors import ApiError

T = TypeVar("T")
CLIENT_CLOSED_REQUEST = 499  # nginx's word for it: nobody sees it but the log


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled when the client goes, which raises ApiError 499."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_disconnect(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client has gone")
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await asyncio.wait((task, gone))
