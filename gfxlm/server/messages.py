"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictBool

from gfxlm.engine.grammar import Grammar
from gfxlm.server import parts
from gfxlm.server.connection import while_connected
from gfxlm.server.errors import invalid
from gfxlm.server.fields import Body, ignored_header
from gfxlm.server.message_blocks import Blocks, finished_content, messages_of
from gfxlm.server.output import Event
from gfxlm.server.sampling import SamplingFields
from gfxlm.server.settings import Settings
from gfxlm.server.sse import NamedEvent, stream
from gfxlm.server.template import ChatOptions, Effort, rendered, template_options
from gfxlm.server.tools.tool import Tool
from gfxlm.server.turn import Ask, Step, ToolChoice, Turn, begin
from gfxlm.server.worker import Worker

router = APIRouter()
_MODES: dict[str, Literal["auto", "required", "none"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageTool(Body):
    """A tool of the client's. Tools that a server would run itself are refused."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def tool(self, i: int) -> Tool:
        """For the model."""
        return parts.tool(self.name, self.description, self.input_schema, self.strict, f"tools[{i}]")


class MessageToolChoice(Body):
    """Whether tools may, must or must not be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingOptions(Body):
    """Whether to think. A budget cannot be held to."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: int | None = Field(None, description="Ignored.")
    display: str | None = Field(None, description="Ignored.")


class OutputFormat(Body):
    """The schema of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputOptions(Body):
    """What the answer shall be like."""

    effort: Effort | None = Field(None, description="A variable of the chat template, reasoning_effort.")
    format: OutputFormat | None = None


class InputMessage(Body):
    """A message: text, or blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CountBody(Body):
    """What a prompt is made of."""

    model: str | None = None
    messages: list[InputMessage] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")

    def ask(self, settings: Settings) -> Ask:
        """What it wants. Raises ApiError 400 for what cannot be done."""
        effort = None if self.output_config is None else self.output_config.effort
        form = None if self.output_config is None else self.output_config.format
        thinking = None if self.thinking is None else self.thinking.type != "disabled"
        template = template_options(settings.chat_template_args, self.chat_template_kwargs, effort, thinking=thinking)
        goes_on = self.messages[-1].role == "assistant"
        given = [(message.role, message.content) for message in self.messages]
        return Ask(
            messages=messages_of(given, self.system),
            options=ChatOptions(template=template, add_generation_prompt=not goes_on, continue_final_message=goes_on),
            tools=[tool.tool(i) for i, tool in enumerate(self.tools or ())],
            choice=self._choice(),
            structure=None if form is None else Grammar("json_schema", json.dumps(form.schema_)),
            structured_by="output_config",
        )

    def _choice(self) -> ToolChoice:
        choice = self.tool_choice
        if choice is None:
            return ToolChoice()
        if (choice.type == "tool") != (choice.name is not None):
            raise invalid("tool_choice: type tool needs a name, and no other has one", param="tool_choice")
        parallel = not choice.disable_parallel_tool_use and choice.name is None
        return ToolChoice(mode=_MODES[choice.type], name=choice.name, parallel=parallel)


class MessagesBody(SamplingFields, CountBody):
    """Anthropic's fields, and those of `SamplingFields`. Without `max_tokens` the server's default holds."""

    stop_sequences: list[str] | None = None
    stream: StrictBool | None = None
    metadata: dict[str, Any] | None = Field(None, description="Ignored.")
    service_tier: str | None = Field(None, description="Ignored.")
    cache_control: Any = Field(None, description="Ignored: prefixes are found by their tokens.")

    def model_post_init(self, context: Any, /) -> None:
        """Anthropic's name for `stop`."""
        if self.stop_sequences:
            self.stop = self.stop_sequences


@router.post("/v1/messages", response_model=None)
async def create_message(body: MessagesBody, request: Request) -> Response:
    """Answer a conversation."""
    settings: Settings = request.app.state.settings
    ask = body.ask(settings)
    worker: Worker = await request.app.state.models.get(body.model)
    turn = await begin(worker, settings, ask, body)
    answer = _Answer(worker.name, turn)
    headers = ignored_header(body)
    if body.stream:
        return stream(answer.events(), request, settings.keepalive_seconds, headers)
    return JSONResponse(await while_connected(request, answer.whole()), headers=headers)


@router.post("/v1/messages/count_tokens", response_model=None)
async def count_tokens(body: CountBody, request: Request) -> Response:
    """How many tokens the prompt has."""
    settings: Settings = request.app.state.settings
    ask = body.ask(settings)
    worker: Worker = await request.app.state.models.get(body.model)
    prompt = await asyncio.to_thread(
        rendered, worker.tokenizer, ask.messages, ask.offered, ask.options, settings.tool_parser
    )
    return JSONResponse({"input_tokens": len(prompt.tokens)}, headers=ignored_header(body))


class _Answer:
    """The answer to one request, as a whole and in events."""

    def __init__(self, model: str, turn: Turn) -> None:
        self._turn = turn
        self._message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that comes at once."""
        events: list[Event] = []
        async with aclosing(self._turn.steps()) as coming:
            async for _, step in coming:
                events += step.events
        content = finished_content(events)
        ending = _ending(step)
        if ending["stop_reason"] == "tool_use" and not any(block["type"] == "tool_use" for block in content):
            ending["stop_reason"] = "end_turn"
        return self._message | {"content": content, **ending, "usage": self._usage()}

    async def events(self) -> AsyncIterator[NamedEvent]:
        """The events of an answer that comes as it is made."""
        blocks = Blocks()
        begun = False
        async with aclosing(self._turn.steps()) as coming:
            async for _, step in coming:
                if not begun:
                    begun = True
                    yield _event("message_start", message=self._message | {"usage": self._usage()})
                    yield _event("ping")
                for event in step.events:
                    for data in blocks.of(event):
                        yield _event(**data)
        for data in blocks.close():
            yield _event(**data)
        yield _event("message_delta", delta=_ending(step), usage=self._usage())
        yield _event("message_stop")

    def _usage(self) -> dict[str, int]:
        generation = self._turn.generations[0]
        return {
            "input_tokens": generation.prompt_tokens - generation.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": generation.cached_tokens,
            "output_tokens": generation.generated_tokens,
        }


def _ending(step: Step) -> dict[str, Any]:
    reason = _REASONS[step.finish_reason or "stop"]
    if reason == "end_turn" and step.piece.stop is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": step.piece.stop if reason == "stop_sequence" else None}


def _event(type: str, **data: Any) -> NamedEvent:
    return type, json.dumps({"type": type, **data})
