"""Contents of messages that come in parts, and tools: what the dialects have in common."""

import json
from collections.abc import Mapping
from typing import Any

from gfxlm.server.errors import invalid
from gfxlm.server.tools.tool import Tool

_TEXT = ("text", "input_text", "output_text", "reasoning_text", "summary_text", "refusal")


def text_of(content: object, where: str) -> str:
    """The text of a content, "" of none, its parts on lines of their own. ApiError 400 for what is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise invalid(f"{where}: must be a string or a list of parts", param=_param(where))
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: Mapping[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind not in _TEXT:
        raise invalid(f"{where}: parts of type {kind!r} are not supported, only text is", param=_param(where))
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise invalid(f"{where}: a part of type {kind!r} needs a text", param=_param(where))
    return text


def call(id: str, name: str, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    """A call that the model has made before, as chat templates want it: its arguments as an object, if they are one."""
    if isinstance(arguments, str):
        try:
            loaded = json.loads(arguments or "{}", strict=False)
        except ValueError:
            loaded = None
        arguments = loaded if isinstance(loaded, dict) else arguments
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(
    name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool | None, where: str
) -> Tool:
    """A tool of a request. ApiError 400 where its schema is not that of an object."""
    if not name:
        raise invalid(f"{where}: a tool needs a name", param=_param(where))
    parameters = parameters or {}
    kind, properties, required = (parameters.get(key) for key in ("type", "properties", "required"))
    wrong = [
        message
        for fits, message in (
            (kind in (None, "object"), f"be of type object, but is {kind!r}"),
            (isinstance(properties, dict | None), "have an object as properties"),
            (
                isinstance(required, list | None) and all(isinstance(key, str) for key in required or ()),
                "require names",
            ),
        )
        if not fits
    ]
    if wrong:
        raise invalid(f"{where}: the schema of {name!r} must {wrong[0]}", param=_param(where))
    return Tool(name, description, parameters, bool(strict))


def _param(where: str) -> str:
    return where.split("[")[0].split(".")[0]
