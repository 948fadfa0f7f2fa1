"""What /v1/responses sends: items that grow event by event, and the response that holds them in the end."""

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gfxlm.server.errors import ApiError
from gfxlm.server.logprobs import described
from gfxlm.server.output import Event, ToolArguments, ToolCall, ToolCallEnd
from gfxlm.server.reasoning import Reasoning
from gfxlm.server.sse import NamedEvent
from gfxlm.server.tools.tool import Content
from gfxlm.server.turn import Step, Turn
from gfxlm.server.usage import usage

if TYPE_CHECKING:
    from gfxlm.engine.tokenizer import Tokenizer


def response_object(model: str, echo: Mapping[str, Any]) -> dict[str, Any]:
    """A response that has just begun."""
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "usage": None,
        **echo,
    }


class ResponseEvents:
    """Turns steps into events, and fills in `response` as it goes."""

    def __init__(self, response: dict[str, Any], tokenizer: "Tokenizer", turn: Turn) -> None:
        self.response = response
        self._tokenizer, self._turn = tokenizer, turn
        self._number = 0
        self._begun = False
        self._item: dict[str, Any] | None = None  # the one that is growing, the last of the output
        self._logprobs: list[dict[str, Any]] = []  # of text that is held back

    def of(self, step: Step) -> Iterator[NamedEvent]:
        """The events of a step; around the first and the last one, those of the response."""
        if not self._begun:
            self._begun = True
            yield self._event("response.created", response=self.response)
            yield self._event("response.in_progress", response=self.response)
        self._logprobs += described(self._tokenizer, step.piece.logprobs)
        for event in step.events:
            yield from self._of(event)
        if step.finish_reason is not None:
            yield from self._end("incomplete" if step.finish_reason == "length" else "completed")

    def failed(self, error: ApiError) -> NamedEvent:
        """The last event where something went wrong."""
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=self.response)

    def _of(self, event: Event) -> Iterator[NamedEvent]:
        match event:
            case Reasoning(text):
                yield from self._text("reasoning", "reasoning_text", text)
            case Content(text):
                yield from self._text("message", "output_text", text)
            case ToolCall(_, id, name):
                yield from self._close("completed")
                yield from self._open(
                    {"type": "function_call", "id": _id("fc"), "call_id": id, "name": name, "arguments": ""}
                )
            case ToolArguments(_, text):
                assert self._item is not None
                self._item["arguments"] += text
                yield self._of_item("response.function_call_arguments.delta", delta=text)
            case ToolCallEnd():
                pass  # it is closed by what comes next, which says whether it is complete

    def _text(self, item_type: str, part_type: str, text: str) -> Iterator[NamedEvent]:
        if self._item is None or self._item["type"] != item_type:
            yield from self._close("completed")
            item: dict[str, Any] = {"type": item_type, "id": _id("rs" if item_type == "reasoning" else "msg")}
            part: dict[str, Any] = {"type": part_type, "text": ""}
            if item_type == "reasoning":
                item["summary"] = []
            else:
                item["role"] = "assistant"
                part |= {"annotations": [], "logprobs": []}
            yield from self._open({**item, "content": []})
            assert self._item is not None
            self._item["content"].append(part)
            yield self._of_item("response.content_part.added", content_index=0, part=part)
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        more: dict[str, Any] = {}
        if part_type == "output_text":
            more["logprobs"], self._logprobs = self._logprobs, []
            part["logprobs"] += more["logprobs"]
        yield self._of_item(f"response.{part_type}.delta", content_index=0, delta=text, **more)

    def _open(self, item: dict[str, Any]) -> Iterator[NamedEvent]:
        self._logprobs = [] if item["type"] != "message" else self._logprobs
        self._item = {**item, "status": "in_progress"}
        self.response["output"].append(self._item)
        yield self._event("response.output_item.added", output_index=self._index, item=self._item)

    def _close(self, status: str) -> Iterator[NamedEvent]:
        item = self._item
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            more = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **more)
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._of_item(f"response.{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self._item = None

    def _end(self, status: str) -> Iterator[NamedEvent]:
        yield from self._close(status)
        counts = usage(self._turn.generations)
        self.response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {"cache_write_tokens": 0, **counts["prompt_tokens_details"]},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": self._turn.reasoning_tokens},
                "total_tokens": counts["total_tokens"],
            },
            "timings": self._turn.generations[0].timings,
        }
        yield self._event(f"response.{status}", response=self.response)

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _of_item(self, name: str, /, **data: Any) -> NamedEvent:
        assert self._item is not None
        return self._event(name, item_id=self._item["id"], output_index=self._index, **data)

    def _event(self, name: str, /, **data: Any) -> NamedEvent:
        number, self._number = self._number, self._number + 1
        return name, json.dumps({"type": name, "sequence_number": number, **data})


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
