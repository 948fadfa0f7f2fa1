"""Anthropic's blocks: those of a request to messages, and those of an answer."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gfxlm.server import parts
from gfxlm.server.errors import invalid
from gfxlm.server.output import Event, ToolArguments, ToolCall, ToolCallEnd
from gfxlm.server.reasoning import Reasoning
from gfxlm.server.template import Message
from gfxlm.server.tools.tool import Content

Block = Mapping[str, Any]


def messages_of(
    given: Iterable[tuple[str, str | Sequence[Block]]], system: str | Sequence[Block] | None
) -> list[Message]:
    """The conversation. Results of tools become messages of their own. ApiError 400 for blocks that are no text."""
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": parts.text_of(system, "system")})
    for i, (role, content) in enumerate(given):
        where = f"messages[{i}].content"
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif role == "assistant":
            messages.append(_assistant(content, where))
        else:
            results = [block for block in content if block.get("type") == "tool_result"]
            rest = [block for block in content if block.get("type") != "tool_result"]
            messages += [_result(block, where) for block in results]
            if rest or not results:
                messages.append({"role": role, "content": parts.text_of(rest, where)})
    return messages


def _assistant(content: Sequence[Block], where: str) -> Message:
    texts, thoughts, calls = [], [], []
    for block in content:
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(_text(block, "thinking", where))
        elif kind == "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise invalid(f"{where}: the input of a tool_use must be an object", param="messages")
            calls.append(parts.call(_text(block, "id", where), _text(block, "name", where), arguments))
        elif kind != "redacted_thinking":  # which nobody here can read
            texts.append(block)
    message: Message = {"role": "assistant", "content": parts.text_of(texts, where)}
    more = {"reasoning_content": "\n".join(thoughts), "tool_calls": calls}
    return message | {key: value for key, value in more.items() if value}


def _result(block: Block, where: str) -> Message:
    text = parts.text_of(block.get("content"), f"{where}: tool_result")
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": _text(block, "tool_use_id", where), "content": text}


def _text(block: Block, name: str, where: str) -> str:
    if not isinstance(value := block.get(name), str):
        raise invalid(f"{where}: a block of type {block.get('type')} needs a string {name}", param="messages")
    return value


class Blocks:
    """The blocks of a stream, one after the other, as the data of their events."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None

    def of(self, event: Event) -> Iterator[dict[str, Any]]:
        """The events that say this."""
        match event:
            case Reasoning(text):
                yield from self._begin("thinking", thinking="", signature="")
                yield self._delta("thinking_delta", thinking=text)
            case Content(text):
                yield from self._begin("text", text="")
                yield self._delta("text_delta", text=text)
            case ToolCall(_, id, name):
                yield from self.close()
                yield from self._begin("tool_use", id=id, name=name, input={})
            case ToolArguments(_, text):
                yield self._delta("input_json_delta", partial_json=text)
            case ToolCallEnd():
                yield from self.close()

    def close(self) -> Iterator[dict[str, Any]]:
        """End the block that is open, if one is."""
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
            self._open = None

    def _begin(self, kind: str, **block: Any) -> Iterator[dict[str, Any]]:
        if self._open == kind:
            return
        yield from self.close()
        self._open = kind
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **block}}

    def _delta(self, kind: str, **delta: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **delta}}


def finished_content(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The blocks of a whole answer. A call whose arguments are no object is text: an input is nothing else."""
    content: list[dict[str, Any]] = []
    for event in events:
        match event:
            case Reasoning(text):
                _extend(content, "thinking", text, signature="")
            case Content(text):
                _extend(content, "text", text)
            case ToolCall(_, id, name):
                content.append({"type": "tool_use", "id": id, "name": name, "input": ""})
            case ToolArguments(_, text):
                content[-1]["input"] += text
            case ToolCallEnd():
                content[-1] = _whole_call(content[-1])
    return content


def _extend(content: list[dict[str, Any]], kind: str, text: str, **more: str) -> None:
    if not content or content[-1]["type"] != kind:
        content.append({"type": kind, kind: "", **more})
    content[-1][kind] += text


def _whole_call(call: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(call["input"], strict=False)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        return {"type": "text", "text": f"{call['name']} {call['input']}"}
    return {**call, "input": arguments}
