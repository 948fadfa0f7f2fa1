"""The application: routes, what stands before them, and errors in the clients' own form."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gfxlm import __version__
from gfxlm.server.chat import router as chat
from gfxlm.server.completions import router as completions
from gfxlm.server.embeddings import router as embeddings
from gfxlm.server.errors import ApiError, as_api_error, invalid
from gfxlm.server.limits import BodyLimit
from gfxlm.server.logs import RequestLog
from gfxlm.server.messages import router as messages
from gfxlm.server.metrics import Metrics
from gfxlm.server.metrics import router as metrics_router
from gfxlm.server.models import router as models_router
from gfxlm.server.page import router as page
from gfxlm.server.registry import Models
from gfxlm.server.responses import router as responses
from gfxlm.server.security import ApiKeys
from gfxlm.server.settings import Settings
from gfxlm.server.tokens import router as tokens

_ROUTERS = (models_router, chat, completions, responses, messages, embeddings, tokens, metrics_router, page)


def create_app(models: Models, settings: Settings, metrics: Metrics) -> FastAPI:
    """The server's application, which begins to load the first model as it starts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        models.start()
        yield
        await models.close()

    app = FastAPI(title="gfxlm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.models, app.state.settings, app.state.metrics = models, settings, metrics
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _bad_body)
    # The last one stands first.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_size)
    app.add_middleware(ApiKeys, keys=settings.api_keys)
    app.add_middleware(Errors)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "Warning", "Retry-After"],
        )
    app.add_middleware(RequestLog, bodies=settings.log_prompts)
    return app


class Errors:
    """Answers whatever was raised below, by those who stand before the routes too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await _response(Request(scope), as_api_error(error))(scope, receive, send)


def _response(request: Request, error: ApiError) -> JSONResponse:
    if error.status >= 500:
        request.state.error = error.message
    body = error.body(request.url.path, request.state.request_id)
    return JSONResponse(body, status_code=error.status, headers=error.headers)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    return _response(request, as_api_error(error))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses: unknown paths and methods, and bodies that could not be read."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):
        return _response(request, error.__cause__)
    path, status = request.url.path, error.status_code
    message = {
        HTTPStatus.NOT_FOUND: f"there is no {path}",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{path} does not take {request.method}",
        # Too deep, a number too long, or not UTF-8.
        HTTPStatus.BAD_REQUEST: f"the body is not valid JSON: {str(error.__cause__ or error.detail).split(';')[0]}",
    }.get(HTTPStatus(status), str(error.detail))
    return _response(request, ApiError(status, message, headers=error.headers))


async def _bad_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "")
    if "json" not in kind and request.method == "POST":
        was = f", not as {kind}" if kind else ""
        return _response(request, invalid(f"the body must be JSON, sent with 'Content-Type: application/json'{was}"))
    return _response(request, explained(error))


def explained(error: RequestValidationError) -> ApiError:
    """What is wrong with the first bad field of a body, in one line; `param` names the field."""
    found: list[dict[str, Any]] = list(error.errors())
    first = found[0]
    where = _place(first, error.body)
    if first["type"] == "json_invalid":
        return invalid(f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "value_error":
        return invalid(str(first["ctx"]["error"]), param=str(where[0]) if where else None)
    if not where:
        return invalid("the body must be a JSON object")
    # A value that may be one of several things has an entry for each of them.
    ways = [other["msg"] for other in found if list(other["loc"][1 : 1 + len(where)]) == where]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")
    return invalid(f"{name}: {'; or: '.join(dict.fromkeys(ways))}", param=str(where[0]))


def _place(error: Mapping[str, Any], body: Any) -> list[int | str]:
    """As much of an error's location as is a place in the body; what follows is which kind of value was tried there."""
    place: list[int | str] = []
    _, *location = error["loc"]
    for part in location:
        there = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if not there:
            last = error["type"] == "missing" and len(place) == len(location) - 1
            return [*place, part] if last else place
        place.append(part)
        body = body[part]
    return place
