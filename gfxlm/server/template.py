"""Messages to a prompt: through the model's chat template, or without one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gfxlm.engine.conversation import plain_text
from gfxlm.errors import UserError
from gfxlm.server.errors import invalid
from gfxlm.server.reasoning import Thinking, think_tags
from gfxlm.server.tools import Format, detected_format, named_format
from gfxlm.server.tools.qwen import written_call
from gfxlm.server.tools.tool import Tool
from gfxlm.server.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gfxlm.engine.tokenizer import Tokenizer

Message = dict[str, Any]
# OpenAI's words and Anthropic's; a template that has others takes them from chat_template_kwargs.
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# What a request must not say to the template: it is said elsewhere, or it is not the template's business.
_RESERVED = {
    "self",
    "messages",
    "conversation",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
}
_NO_EFFORT = ("none", "minimal")
_TOOLS = """You can call these functions, given with the JSON schemas of their arguments:
{tools}

To call one, answer with nothing but its name and arguments, like this:
{example}"""
_EXAMPLE = '{"name": "...", "arguments": {...}}'


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, how the answer to them may think, and in which form it would call tools."""

    tokens: list[int]
    thinking: Thinking | None
    form: Format


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """What a request says about its prompt besides messages; `template` holds variables of the chat template."""

    template: Mapping[str, Any]
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def template_options(
    defaults: Mapping[str, Any], given: Mapping[str, Any] | None, effort: str | None, *, thinking: bool | None = None
) -> dict[str, Any]:
    """The template's variables: the server's, then the request's. ApiError 400 for one that is taken.

    A reasoning `effort` of none or minimal switches thinking off, any other on, unless the request says it itself.
    """
    for name in given or ():
        if name in _RESERVED:
            raise invalid(f"chat_template_kwargs: {name!r} cannot be set here", param="chat_template_kwargs")
    options = dict(defaults)
    if effort is not None:
        options |= {"enable_thinking": effort not in _NO_EFFORT, "reasoning_effort": effort}
    if thinking is not None:
        options["enable_thinking"] = thinking
    return options | dict(given or {})


def tool_format(tokenizer: "Tokenizer", name: str | None) -> Format:
    """The form of this model's calls: the one of that `name`, or what its template or its tokens tell, or Hermes'."""
    template = _template(tokenizer)
    if name is not None:
        return named_format(name, template)
    # A template without tools is given a description of them, which asks for Hermes' form.
    found = detected_format(template, Vocabulary(tokenizer)) if "tools" in template else None
    return found or named_format("hermes")


def rendered(
    tokenizer: "Tokenizer",
    messages: Sequence[Message],
    tools: Sequence[Tool],
    options: ChatOptions,
    tool_parser: str | None = None,
) -> Prompt:
    """The prompt for a chat. ApiError 400 for messages that the template refuses. Takes a while for long ones."""
    form = tool_format(tokenizer, tool_parser)
    if "tools" not in _template(tokenizer):
        messages = [_without_calls(message) for message in messages]
        messages = _described(tools, form, messages) if tools else messages
    try:
        text = _text(tokenizer, messages, tools, options)
        thinking = _thinking(tokenizer, messages, tools, options, text)
    except UserError as error:
        raise invalid(str(error), param="messages") from error
    special = not tokenizer.has_chat_template
    return Prompt(tokenizer.encode(text, add_special_tokens=None if special else False), thinking, form)


def _template(tokenizer: "Tokenizer") -> str:
    """The template for chats with tools, "" where there is none."""
    return str(tokenizer.get_chat_template(tools=[{}])) if tokenizer.has_chat_template else ""


def _text(tokenizer: "Tokenizer", messages: Sequence[Message], tools: Sequence[Tool], options: ChatOptions) -> str:
    if not tokenizer.has_chat_template:
        return plain_text(messages)
    template = dict(options.template)
    if options.continue_final_message:
        template["continue_final_message"] = True
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=options.add_generation_prompt,
        tokenize=False,
        tools=[tool.openai for tool in tools] or None,
        **template,
    )


def _thinking(
    tokenizer: "Tokenizer", messages: Sequence[Message], tools: Sequence[Tool], options: ChatOptions, text: str
) -> Thinking | None:
    vocabulary = Vocabulary(tokenizer)
    tags = think_tags(vocabulary)
    if tags is None:
        return None
    start, end = tags
    end_token = vocabulary.token(end)
    assert end_token is not None
    if options.continue_final_message:
        begun = str(messages[-1]["content"])
        return Thinking(start, end, end_token, inside=True) if begun.rfind(start) > begun.rfind(end) else None
    if not options.add_generation_prompt or not tokenizer.has_chat_template:
        return Thinking(start, end, end_token)
    before = _text(tokenizer, messages, tools, ChatOptions(template=options.template, add_generation_prompt=False))
    opening = text[len(before) :] if text.startswith(before) else ""
    if end in opening:
        return None
    inside = start in opening
    switched = "enable_thinking" in _template(tokenizer) and bool(options.template.get("enable_thinking", True))
    return Thinking(start, end, end_token, inside=inside, expected=inside or switched)


def _described(tools: Sequence[Tool], form: Format, messages: list[Message]) -> list[Message]:
    """The messages with a description of the tools, for a template that does not write one."""
    if form.name != "hermes":
        raise invalid(
            f"tools: this model's chat template takes none, and cannot ask for calls in the form {form.name}; start "
            "the server with --tool-parser hermes",
            param="tools",
        )
    schemas = "\n".join(json.dumps(tool.openai, ensure_ascii=False) for tool in tools)
    text = _TOOLS.format(tools=schemas, example=written_call(_EXAMPLE))
    if messages and messages[0]["role"] in ("system", "developer"):
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _without_calls(message: Message) -> Message:
    """The message with calls and their results as plain text, for a template that knows of neither."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [{key: call["function"][key] for key in ("name", "arguments")} for call in message["tool_calls"]]
    texts = [written_call(json.dumps(call, ensure_ascii=False)) for call in calls]
    content = "\n".join([message["content"], *texts] if message["content"] else texts)
    return {"role": "assistant", "content": content}
