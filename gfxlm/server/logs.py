"""Logs: one line a request, in JSON or for people, with an id that the client gets too. Never what anybody wrote."""

import json
import logging
import re
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gfxlm.server.connection import CLIENT_CLOSED_REQUEST
from gfxlm.server.errors import is_anthropics
from gfxlm.server.generation import Generation, started

requests = logging.getLogger("gfxlm.server.requests")
_LONGEST_BODY = 64 << 10  # what is logged of it
_ID = re.compile(rb"[\w.:\-]{1,128}", re.ASCII)


class RequestLog:
    """Gives each request an id (x-request-id, the client's own if it sends one), and logs and counts its answer.

    The line has the model, and counts and times of tokens, where any were asked for; what came with the request only
    where `bodies` are wanted.
    """

    def __init__(self, app: ASGIApp, bodies: bool = False) -> None:
        self._app, self._bodies = app, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = _request_id(scope)
        generations: list[Generation] = []
        token = started.set(generations)
        status, begun = 0, time.monotonic()
        body = bytearray()

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if is_anthropics(scope["path"]):
                    headers["request-id"] = request_id
            await send(message)

        async def noted() -> Message:
            message = await receive()
            body.extend(message.get("body", b"")[: _LONGEST_BODY - len(body)])
            return message

        try:
            await self._app(scope, noted if self._bodies else receive, identified)
        finally:
            started.reset(token)
            for generation in generations:
                generation.cancel()
            self._log(scope, status, time.monotonic() - begun, generations, bytes(body))

    @staticmethod
    def _log(scope: Scope, status: int, seconds: float, generations: list[Generation], body: bytes) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        metrics = scope["app"].state.metrics
        status = status or CLIENT_CLOSED_REQUEST  # it went before anything was sent
        metrics.on_http(scope["method"], route, status)
        fields = {
            "id": scope["state"]["request_id"],
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "client": (scope.get("client") or ("",))[0],
            **_tokens(generations),
        }
        if "error" in scope["state"]:
            fields["error"] = scope["state"]["error"]
        if body:
            fields["body"] = body.decode(errors="replace")
        quiet = route in ("/health", "/v1/health", "/metrics")
        requests.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


def _tokens(generations: list[Generation]) -> dict[str, str | float]:
    """The model, counts of all texts of a request, and the times of the slowest."""
    if not generations:
        return {}
    timings = [generation.timings for generation in generations]
    return {
        "model": generations[0].model,
        "prompt_tokens": generations[0].prompt_tokens,
        "cached_tokens": max(generation.cached_tokens for generation in generations),
        "generated_tokens": sum(generation.generated_tokens for generation in generations),
        "prompt_ms": round(max(timing["prompt_ms"] for timing in timings), 1),
        "predicted_ms": round(max(timing["predicted_ms"] for timing in timings), 1),
    }


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


class JsonFormatter(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time (UTC), level, logger, message and fields."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=True, default=str)


class TextFormatter(logging.Formatter):
    """The same for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, message, and fields as name=value."""
        fields = getattr(record, "fields", {})
        text = super().format(record)
        return text + "".join(f" {name}={value}" for name, value in fields.items())


def configure(level: str, style: str) -> None:
    """Send the server's and uvicorn's logs to stderr in this `style`, "json" or "text"."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    for name in ("gfxlm", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    if level == "info":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # what there is to know is said by ours
    logging.getLogger("uvicorn.access").disabled = True  # our own line says more
