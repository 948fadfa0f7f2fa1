"""POST /v1/chat/completions."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictBool

from gfxlm.engine.params import MAX_TOP_LOGPROBS
from gfxlm.server import parts
from gfxlm.server.completions import MOST_TEXTS, StreamOptions
from gfxlm.server.connection import while_connected
from gfxlm.server.errors import invalid
from gfxlm.server.fields import Body, ignored_header
from gfxlm.server.logprobs import described
from gfxlm.server.output import Event, Said, ToolArguments, ToolCall, ToolCallEnd
from gfxlm.server.reasoning import Reasoning
from gfxlm.server.sampling import SamplingFields
from gfxlm.server.settings import Settings
from gfxlm.server.sse import DONE, stream
from gfxlm.server.structure import StructureFields
from gfxlm.server.template import ChatOptions, Effort, Message, template_options
from gfxlm.server.tools.tool import Content, Tool
from gfxlm.server.turn import Ask, Step, ToolChoice, Turn, begin
from gfxlm.server.usage import usage
from gfxlm.server.worker import Worker

router = APIRouter()


class FunctionCall(Body):
    """A call that the model made: a tool's name and JSON arguments."""

    name: str
    arguments: str | dict[str, Any] = ""


class MessageCall(Body):
    """The same with its id."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One message. Parts that are not text are refused."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="What the model thought; some templates show it.")
    reasoning: str | None = Field(None, description="The same by another name.")

    def message(self, i: int) -> Message:
        """As chat templates want it. ApiError 400 for one that says nothing, unless it calls tools."""
        if self.content is None and self.role != "assistant":
            raise invalid(f"messages[{i}].content: is missing", param=f"messages[{i}].content")
        message: Message = {"role": self.role, "content": parts.text_of(self.content, f"messages[{i}].content")}
        if self.tool_calls:
            message["tool_calls"] = [
                parts.call(call.id, call.function.name, call.function.arguments) for call in self.tool_calls
            ]
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        more["reasoning_content"] = self.reasoning_content or self.reasoning
        return message | {key: value for key, value in more.items() if value is not None}


class Function(Body):
    """A tool: what it is called, what it does, the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Hold calls to the schema, where calls begin with a token.")


class FunctionTool(Body):
    """A tool in its wrapping."""

    type: Literal["function"]
    function: Function

    def tool(self, i: int) -> Tool:
        """For the model."""
        given = self.function
        return parts.tool(given.name, given.description, given.parameters, given.strict, f"tools[{i}]")


class FunctionName(Body):
    """Which function."""

    name: str


class NamedChoice(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


class ChatBody(SamplingFields, StructureFields):
    """OpenAI's fields, and those of vLLM, llama.cpp and mlx-lm."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = Field(None, description="none and minimal switch thinking off, others on.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool = Field(False, description="Go on with the last message, an assistant's.")
    modalities: list[Literal["text"]] | None = None
    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Ignored.")
    store: bool | None = Field(None, description="Ignored: nothing is kept.")
    service_tier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored: prefixes are found by their tokens.")
    safety_identifier: str | None = Field(None, description="Ignored.")

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most, where the request says it."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell of, None for no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def ask(self, settings: Settings) -> Ask:
        """What it wants. Raises ApiError 400 for what cannot be done."""
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs: only with logprobs", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options: only with stream", param="stream_options")
        return Ask(
            messages=[message.message(i) for i, message in enumerate(self.messages)],
            options=self._options(settings),
            tools=[tool.tool(i) for i, tool in enumerate(self.tools or ())],
            choice=self._choice(),
            structure=self.structure(),
            structured_by=self.structured_by(),
        )

    def _options(self, settings: Settings) -> ChatOptions:
        template = template_options(settings.chat_template_args, self.chat_template_kwargs, self.reasoning_effort)
        prompt = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        if self.continue_final_message and (prompt or self.messages[-1].role != "assistant"):
            raise invalid(
                "continue_final_message: the last message must be the assistant's, and add_generation_prompt off",
                param="continue_final_message",
            )
        return ChatOptions(
            template=template, add_generation_prompt=prompt, continue_final_message=self.continue_final_message
        )

    def _choice(self) -> ToolChoice:
        parallel = self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, NamedChoice):
            return ToolChoice(mode="required", name=self.tool_choice.function.name, parallel=False)
        return ToolChoice(mode=self.tool_choice or "auto", parallel=parallel)


@router.post("/v1/chat/completions", response_model=None)
@router.post("/chat/completions", response_model=None, include_in_schema=False)
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    settings: Settings = request.app.state.settings
    ask = body.ask(settings)
    worker: Worker = await request.app.state.models.get(body.model)
    turn = await begin(worker, settings, ask, body, n=body.n or 1, top_logprobs=body.wanted_logprobs)
    answer = _Answer(body, worker, turn)
    headers = ignored_header(body)
    if body.stream:
        return stream(answer.events(), request, settings.keepalive_seconds, headers)
    return JSONResponse(await while_connected(request, answer.whole()), headers=headers)


class _Answer:
    """The answers to one request, as a whole and in chunks."""

    def __init__(self, body: ChatBody, worker: Worker, turn: Turn) -> None:
        self._body, self._tokenizer, self._turn = body, worker.tokenizer, turn
        self._frame = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": worker.name,
        }
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in turn.generations]

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that comes at once."""
        reasons: dict[int, str | None] = {}
        async with aclosing(self._turn.steps()) as coming:
            async for i, step in coming:
                self._note(i, step)
                reasons[i] = step.finish_reason
        choices = [
            {
                "index": i,
                "message": _message(said),
                "logprobs": self._noted(i),
                "finish_reason": reasons[i],
            }
            for i, said in enumerate(self._turn.said)
        ]
        return self._frame | {"choices": choices} | self._ending()

    async def events(self) -> AsyncIterator[str]:
        """The chunks of an answer that comes as it is made. The first ones say whose answer it is."""
        with_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        remaining = set(range(len(self._turn.generations)))
        begun = False
        async with aclosing(self._turn.steps()) as coming:
            async for i, step in coming:
                if not begun:
                    for number in sorted(remaining):
                        yield self._chunk(number, {"role": "assistant", "content": ""}, **more)
                    begun = True
                self._note(i, step)
                for event in step.events:
                    if delta := _delta(event):
                        yield self._chunk(i, delta, logprobs=self._noted(i), **more)
                if step.finish_reason is not None:
                    remaining.discard(i)
                    timings = {} if remaining else {"timings": self._turn.generations[0].timings}
                    reason = step.finish_reason
                    yield self._chunk(i, {}, finish_reason=reason, logprobs=self._noted(i), **more, **timings)
        if with_usage:
            yield json.dumps(self._frame | {"choices": []} | self._ending())
        yield DONE

    def _chunk(
        self, i: int, delta: dict[str, Any], *, finish_reason: str | None = None, logprobs: Any = None, **more: Any
    ) -> str:
        choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return json.dumps(self._frame | {"choices": [choice]} | more)

    def _ending(self) -> dict[str, Any]:
        details = {"completion_tokens_details": {"reasoning_tokens": self._turn.reasoning_tokens}}
        generations = self._turn.generations
        return {"usage": usage(generations, len(generations)) | details, "timings": generations[0].timings}

    def _note(self, i: int, step: Step) -> None:
        """Keep log probabilities until there is something to send them with: text may be held back."""
        self._logprobs[i] += described(self._tokenizer, step.piece.logprobs)

    def _noted(self, i: int) -> dict[str, Any] | None:
        noted, self._logprobs[i] = self._logprobs[i], []
        return {"content": noted, "refusal": None} if self._body.logprobs and noted else None


def _message(said: Said) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.content or (None if said.calls else "")}
    message["refusal"] = None
    if said.reasoning:
        message |= {"reasoning": said.reasoning, "reasoning_content": said.reasoning}
    if said.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in said.calls
        ]
    return message


def _delta(event: Event) -> dict[str, Any] | None:
    match event:
        case Reasoning(text):
            return {"reasoning": text, "reasoning_content": text}
        case Content(text):
            return {"content": text}
        case ToolCall(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case ToolArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case ToolCallEnd():
            return None
