"""Who may ask: API keys."""

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from gfxlm.server.errors import ApiError

# Whether the server is well, and the page, which holds nothing until it has asked with a key.
_OPEN = frozenset(("/health", "/v1/health", "/"))
_OPEN_UNDER = "/page/"


class ApiKeys:
    """Lets those through who send one of the keys, as a bearer token or as Anthropic's clients do."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and not self._allowed(scope):
            raise ApiError(
                401,
                "no valid API key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        path = scope["path"]
        if path in _OPEN or path.startswith(_OPEN_UNDER):
            return True
        headers = dict(scope["headers"])
        kind, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = (bearer.strip() if kind.lower() == b"bearer" else b"", headers.get(b"x-api-key", b""))
        # Every key is compared with whatever was sent, so that time tells nothing about which was nearly right.
        matches = [hmac.compare_digest(key, sent) for key in self._keys for sent in given]
        return any(matches)
