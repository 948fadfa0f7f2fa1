"""The input of /v1/responses: items to messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from gfxlm.server import parts
from gfxlm.server.errors import invalid
from gfxlm.server.template import Message

_ROLES = ("system", "developer", "user", "assistant")
Item = Mapping[str, Any]


def messages_of(given: str | Sequence[Item], instructions: str | None) -> list[Message]:
    """The conversation. What the model thought, said and called in a row is one message. ApiError 400 for odd items."""
    messages: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for i, item in enumerate(given):
        _add(messages, item, f"input[{i}]")
    return messages


def _add(messages: list[Message], item: Item, where: str) -> None:
    kind = item.get("type") or "message"
    if kind == "message":
        _add_message(messages, item, where)
    elif kind == "reasoning":
        thoughts = parts.text_of(item.get("content") or item.get("summary"), f"{where}.content")
        _assistant(messages, fresh=True)["reasoning_content"] = thoughts
    elif kind == "function_call":
        call_id, name = _text(item, "call_id", where), _text(item, "name", where)
        call = parts.call(call_id, name, _text(item, "arguments", where))
        _assistant(messages).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        content = parts.text_of(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": _text(item, "call_id", where), "content": content})
    else:
        raise invalid(f"{where}: items of type {kind!r} are not supported", param="input")


def _add_message(messages: list[Message], item: Item, where: str) -> None:
    role, content = item.get("role"), parts.text_of(item.get("content"), f"{where}.content")
    if role not in _ROLES:
        raise invalid(f"{where}: role must be one of {', '.join(_ROLES)}, but is {role!r}", param="input")
    if role != "assistant":
        messages.append({"role": role, "content": content})
        return
    last = messages[-1] if messages else {}
    follows_thinking = "reasoning_content" in last and not last["content"] and not last.get("tool_calls")
    (last if follows_thinking else _assistant(messages, fresh=True))["content"] = content


def _assistant(messages: list[Message], *, fresh: bool = False) -> Message:
    """The message that the model's next words belong to."""
    if fresh or not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(item: Item, name: str, where: str) -> str:
    if not isinstance(value := item.get(name), str):
        raise invalid(f"{where}.{name}: must be a string", param="input")
    return value
