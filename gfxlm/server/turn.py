"""One answer in a chat, from messages and tools to what the model says: what all three dialects are made of."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from gfxlm.engine.grammar import Grammar
from gfxlm.server.errors import ApiError, invalid
from gfxlm.server.generation import Generation, Piece, merged
from gfxlm.server.output import Event, OutputParser, Said, ToolCallEnd
from gfxlm.server.sampling import SamplingFields
from gfxlm.server.settings import Settings
from gfxlm.server.template import ChatOptions, Message, Prompt, rendered
from gfxlm.server.tools.grammar import any_of, json_of
from gfxlm.server.tools.tool import Tool
from gfxlm.server.vocabulary import Vocabulary
from gfxlm.server.worker import Worker

if TYPE_CHECKING:
    from gfxlm.engine.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "tool_calls"]
_FREE = "/(?s:.*)/"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolChoice:
    """Whether tools may, must or must not be called; which one, if it has to be that one; several at once or not."""

    mode: Literal["auto", "required", "none"] = "auto"
    name: str | None = None
    parallel: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What a request wants, whatever its dialect. `structure` is a grammar for the answer, from the `structured_by`."""

    messages: Sequence[Message]
    options: ChatOptions
    tools: Sequence[Tool] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    structure: Grammar | None = None
    structured_by: str | None = None

    def __post_init__(self) -> None:
        names: set[str] = set()
        for tool in self.tools:
            if tool.name in names:
                raise invalid(f"tools: there are several of the name {tool.name!r}", param="tools")
            names.add(tool.name)
        if self.choice.name is not None and self.choice.name not in names:
            raise invalid(f"tool_choice: there is no tool {self.choice.name!r}", param="tool_choice")
        if self.choice.mode == "required" and not names:
            raise invalid("tool_choice: there are no tools", param="tool_choice")

    @property
    def offered(self) -> Sequence[Tool]:
        """The tools that the model is told about."""
        return () if self.choice.mode == "none" else self.tools


@dataclass(frozen=True, slots=True)
class Step:
    """What a piece of text says. The last one has a finish reason, and the stop string that ended the text."""

    events: Sequence[Event]
    piece: Piece
    finish_reason: FinishReason | None = None


class Turn:
    """An answer under way, or `n` of them to the same prompt."""

    def __init__(self, prompt: Prompt, ask: Ask, tokenizer: "Tokenizer", generations: Sequence[Generation]) -> None:
        self.generations = generations
        self._tokenizer = tokenizer
        self._parallel = ask.choice.parallel
        tools = {tool.name: tool for tool in ask.offered}
        form = prompt.form if tools else None
        self.said = [Said() for _ in generations]
        self._parsers = [OutputParser(prompt.thinking, form, tools) for _ in generations]

    async def steps(self) -> AsyncGenerator[tuple[int, Step]]:
        """What the answers say, each with its number, as it comes. Ends all of them when it is closed."""
        ended: set[int] = set()
        async with aclosing(merged(self.generations)) as coming:
            async for i, piece in coming:
                if i in ended:
                    continue
                step = self._step(self._parsers[i], piece)
                self.said[i].add(step.events)
                if step.finish_reason is not None:
                    ended.add(i)
                    self.generations[i].cancel()
                yield i, step

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the thinking so far, its tags not among them."""
        texts = [said.reasoning for said in self.said if said.reasoning]
        return sum(len(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts)

    def _step(self, parser: OutputParser, piece: Piece) -> Step:
        events = parser.feed(piece.text)
        if piece.finish_reason is not None:
            events += parser.finish()
        ends = [i for i, event in enumerate(events) if isinstance(event, ToolCallEnd)]
        if ends and not self._parallel:
            return Step(events[: ends[0] + 1], piece, "length" if _is_cut(piece, events, ends[0]) else "tool_calls")
        reason: FinishReason | None = piece.finish_reason
        if reason == "stop" and parser.calls:
            reason = "tool_calls"
        return Step(events, piece, reason)


def _is_cut(piece: Piece, events: Sequence[Event], end: int) -> bool:
    """Whether the text ended in the middle of a call, which then is the last thing it says."""
    return piece.finish_reason == "length" and end == len(events) - 1


async def begin(
    worker: Worker, settings: Settings, ask: Ask, fields: SamplingFields, *, n: int = 1, top_logprobs: int | None = None
) -> Turn:
    """Queue the answers. ApiError 400 for what cannot be answered, 429 where too many wait."""
    # Not in the loop: a long conversation takes the template and the tokenizer a while.
    prompt, grammar = await asyncio.to_thread(_prepared, worker, settings, ask)
    params = fields.params(worker, settings, top_logprobs=top_logprobs, grammar=grammar)
    await _check(worker, ask, params.grammar)
    return Turn(prompt, ask, worker.tokenizer, fields.start(worker, settings, prompt.tokens, params, n))


def _prepared(worker: Worker, settings: Settings, ask: Ask) -> tuple[Prompt, Grammar | None]:
    prompt = rendered(worker.tokenizer, ask.messages, ask.offered, ask.options, settings.tool_parser)
    return prompt, constraint(ask, prompt, Vocabulary(worker.tokenizer))


async def _check(worker: Worker, ask: Ask, grammar: Grammar | None) -> None:
    """Compile the grammar. ApiError 400 names the tool whose schema is to blame, if one is."""
    try:
        await worker.check(grammar, param=ask.structured_by)
    except ApiError:
        for tool in ask.offered:
            try:
                await worker.check(Grammar("json_schema", json.dumps(tool.arguments())))
            except ApiError as error:
                raise invalid(f"tools: the schema of {tool.name!r}: {error.message}", param="tools") from error
        raise


def constraint(ask: Ask, prompt: Prompt, vocabulary: Vocabulary) -> Grammar | None:
    """The grammar of the answer, behind the thinking where there will be some.

    A call that must come has to follow its tool's schema; one that may come, only if a tool is `strict` and calls begin
    with a token of their own. ApiError 400 for a structure that excludes calls which may come.
    """
    thinking = prompt.thinking
    after = thinking.end_token if thinking is not None and thinking.expected else None
    tools = [tool for tool in ask.offered if ask.choice.name in (None, tool.name)]
    if not tools:
        return None if ask.structure is None else replace(ask.structure, after=after)
    trigger = prompt.form.trigger
    calls = f"{vocabulary.symbol(trigger)} rest" if trigger else "rest"
    if after is not None:  # models go on with empty lines
        calls = f"/\\n*/ {calls}"
    rules = prompt.form.rules(tools, vocabulary.symbol, parallel=ask.choice.parallel)
    if ask.choice.mode == "required":
        start = f"start: {calls}"
    elif ask.structure is not None:
        start = any_of("start", (calls, json_of(_schema(ask.structure))))
    elif trigger in vocabulary and any(tool.strict for tool in tools):
        start = f"start: free | free {calls}\nfree: {_FREE}"
    else:
        return None
    return Grammar("lark", f"{start}\n{rules}", after)


def _schema(structure: Grammar) -> Mapping[str, Any]:
    if structure.kind == "json_object":
        return {"type": "object"}
    if structure.kind != "json_schema":
        raise invalid(f"{structure.kind}: does not go with tools that may be called; set tool_choice to none")
    try:
        schema = json.loads(structure.text)
    except ValueError as error:
        raise invalid(f"json_schema: {error}") from error
    return schema if isinstance(schema, dict) else {} if schema else {"not": {}}
