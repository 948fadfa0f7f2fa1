"""The chat page: static files out of the package. They hold no secret and fetch nothing from elsewhere."""

import functools
import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Annotated

from fastapi import APIRouter, Header, Response

from gfxlm.server.errors import ApiError

router = APIRouter(include_in_schema=False)

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_POLICY = ("default-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "object-src 'none'")
_HEADERS = {
    # A browser asks each time, and is told 304: a new version of the package shows at once.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(_POLICY),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


@functools.cache
def _files() -> dict[str, _File]:
    """Every file of the page by its name: what is not in this table cannot be asked for."""
    files = {}
    for path in (resources.files("gfxlm.data") / "page").iterdir():
        media_type = _TYPES.get("." + path.name.rpartition(".")[2])
        if media_type is not None:
            content = path.read_bytes()
            files[path.name] = _File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return files


@router.api_route("/", methods=["GET", "HEAD"])
def index(if_none_match: Annotated[str, Header()] = "") -> Response:
    """The page itself."""
    return static("index.html", if_none_match)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
def static(name: str, if_none_match: Annotated[str, Header()] = "") -> Response:
    """One of the page's files; 304 where the browser has it already."""
    file = _files().get(name)
    if file is None:
        raise ApiError(404, f"the chat page has no file {name!r}")
    headers = {**_HEADERS, "ETag": file.etag}
    known = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
