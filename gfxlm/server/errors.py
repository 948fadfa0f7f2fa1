"""What a client is told when something is wrong: OpenAI's error object, or Anthropic's on its routes."""

import logging
from collections.abc import Mapping
from typing import Any

from gfxlm.errors import UserError

log = logging.getLogger("gfxlm.server")

# By status; OpenAI's type, Anthropic's type.
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    499: ("cancelled_error", "api_error"),
    503: ("overloaded_error", "overloaded_error"),
    504: ("timeout_error", "timeout_error"),
}
RETRY_SECONDS = "1"


def is_anthropics(path: str) -> bool:
    """Whether the route at `path` speaks Anthropic's dialect, in errors and headers too."""
    return path.startswith("/v1/messages")


class ApiError(Exception):
    """An answer that is an error: an HTTP status, one line for a person, and what programs look at."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(status, ("server_error" if status >= 500 else "invalid_request_error",))[0]
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, path: str = "", request_id: str | None = None) -> dict[str, Any]:
        """The object that says it, in the manner of the route at `path`."""
        if is_anthropics(path):
            kind = _TYPES.get(self.status, ("", "api_error" if self.status >= 500 else "invalid_request_error"))[1]
            answer: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": self.message}}
            return answer | ({"request_id": request_id} if request_id else {})
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: what was asked for cannot be done as it was asked."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """What to tell the client of any exception; one that nobody foresaw goes into the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return invalid(str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log says more")


def busy(message: str) -> ApiError:
    """A 429: there is too much to do, and soon there will be less."""
    return ApiError(429, f"{message}; try again", code="queue_full", headers={"Retry-After": RETRY_SECONDS})
