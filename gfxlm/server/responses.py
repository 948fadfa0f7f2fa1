"""POST /v1/responses: OpenAI's newer dialect. Nothing is kept between requests."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictBool

from gfxlm.engine.params import MAX_TOP_LOGPROBS
from gfxlm.server import parts
from gfxlm.server.connection import while_connected
from gfxlm.server.errors import as_api_error, invalid
from gfxlm.server.fields import Body, ignored_header
from gfxlm.server.response_events import ResponseEvents, response_object
from gfxlm.server.response_input import messages_of
from gfxlm.server.sampling import SamplingFields
from gfxlm.server.settings import Settings
from gfxlm.server.sse import NamedEvent, stream
from gfxlm.server.structure import ResponseFormat, Schema
from gfxlm.server.template import ChatOptions, Effort, template_options
from gfxlm.server.tools.tool import Tool
from gfxlm.server.turn import Ask, ToolChoice, Turn, begin
from gfxlm.server.worker import Worker

router = APIRouter()
_LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]


class ResponseTool(Body):
    """A function. Tools that a server would run itself are refused."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self, i: int) -> Tool:
        """For the model."""
        return parts.tool(self.name, self.description, self.parameters, self.strict, f"tools[{i}]")


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    name: str


class TextFormat(ResponseFormat):
    """The form of the answer; here, a schema stands beside its type."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Schema | None = Field(None, alias="schema")


class TextOptions(Body):
    """What the answer's text shall be like."""

    format: TextFormat | None = None


class ReasoningOptions(Body):
    """How much to think: none and minimal switch it off, others on."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Ignored: thinking is told in full."
    )
    generate_summary: str | None = Field(None, description="Ignored.")


class ResponsesBody(SamplingFields):
    """OpenAI's fields, and those of `SamplingFields`."""

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[Include] | None = Field(None, description=f"Only {_LOGPROBS} has an effect.")
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = Field(None, description="Ignored.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    previous_response_id: str | None = Field(None, description="Not supported: nothing is kept.")
    conversation: Any = Field(None, description="Not supported: nothing is kept.")
    background: bool | None = Field(None, description="Not supported.")
    prompt: Any = Field(None, description="Not supported.")
    truncation: Literal["disabled"] | None = Field(None, description="auto is not supported.")
    store: bool | None = Field(None, description="Ignored: nothing is kept.")
    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Given back.")
    service_tier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored: prefixes are found by their tokens.")
    safety_identifier: str | None = Field(None, description="Ignored.")

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most, where the request says it."""
        return self.max_output_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell of, None for no log probabilities at all."""
        return self.top_logprobs or (0 if _LOGPROBS in (self.include or ()) else None)

    def ask(self, settings: Settings) -> Ask:
        """What it wants. Raises ApiError 400 for what cannot be done."""
        self._check()
        effort = self.reasoning.effort if self.reasoning is not None else None
        given = self.text.format if self.text is not None else None
        return Ask(
            messages=messages_of(self.input, self.instructions),
            options=ChatOptions(
                template=template_options(settings.chat_template_args, self.chat_template_kwargs, effort)
            ),
            tools=[tool.tool(i) for i, tool in enumerate(self.tools or ())],
            choice=self._choice(),
            structure=None if given is None else given.grammar("text"),
            structured_by="text",
        )

    def _check(self) -> None:
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise invalid(f"{name}: nothing is kept here; send the whole conversation as input", param=name)
        for name in ("background", "prompt"):
            if getattr(self, name):
                raise invalid(f"{name}: not supported", param=name)

    def _choice(self) -> ToolChoice:
        if isinstance(self.tool_choice, NamedTool):
            return ToolChoice(mode="required", name=self.tool_choice.name, parallel=False)
        return ToolChoice(mode=self.tool_choice or "auto", parallel=self.parallel_tool_calls is not False)

    def echo(self) -> dict[str, Any]:
        """What a response says of its request."""
        choice, format = self.tool_choice or "auto", self.text.format if self.text is not None else None
        shown = {"type": "text"} if format is None else format.model_dump(by_alias=True, exclude_none=True)
        effort = self.reasoning.effort if self.reasoning is not None else None
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.limit,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "store": False,
            "temperature": self.temperature,
            "text": {"format": shown},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [
                {"description": None, "parameters": None, "strict": None} | tool.model_dump()
                for tool in self.tools or ()
            ],
            "top_p": self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }


@router.post("/v1/responses", response_model=None)
async def create_response(body: ResponsesBody, request: Request) -> Response:
    """Answer a conversation that the request holds whole."""
    settings: Settings = request.app.state.settings
    ask = body.ask(settings)
    worker: Worker = await request.app.state.models.get(body.model)
    turn = await begin(worker, settings, ask, body, top_logprobs=body.wanted_logprobs)
    events = ResponseEvents(response_object(worker.name, body.echo()), worker.tokenizer, turn)
    headers = ignored_header(body)
    if body.stream:
        return stream(_streamed(events, turn, request), request, settings.keepalive_seconds, headers)
    return JSONResponse(await while_connected(request, _whole(events, turn)), headers=headers)


async def _whole(events: ResponseEvents, turn: Turn) -> dict[str, Any]:
    async with aclosing(turn.steps()) as coming:
        async for _, step in coming:
            list(events.of(step))
    return events.response


async def _streamed(events: ResponseEvents, turn: Turn, request: Request) -> AsyncIterator[NamedEvent]:
    begun = False
    try:
        async with aclosing(turn.steps()) as coming:
            async for _, step in coming:
                for event in events.of(step):
                    begun = True
                    yield event
    except Exception as error:
        if not begun:
            raise
        failure = as_api_error(error)
        request.state.error = failure.message  # for the log: the status line has gone out
        yield events.failed(failure)
