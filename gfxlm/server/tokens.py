"""POST /tokenize and /detokenize: text to token ids and back, with llama.cpp's and vLLM's names."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field, StrictBool, StrictInt

from gfxlm.server.chat import ChatBody, ChatMessage, FunctionTool
from gfxlm.server.errors import invalid
from gfxlm.server.fields import Body, ignored_header
from gfxlm.server.settings import Settings
from gfxlm.server.template import rendered
from gfxlm.server.worker import Worker

router = APIRouter()


class TokenizeBody(Body):
    """A text, as `content` or `prompt`, or a chat as `messages`."""

    model: str | None = None
    content: str | None = Field(None, description="A text, in llama.cpp's words.")
    prompt: str | None = Field(None, description="A text, in vLLM's.")
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, description="A chat, as /v1/chat/completions takes it."
    )
    add_special: StrictBool = Field(False, description="With the tokens that begin and end a text.")
    add_special_tokens: StrictBool | None = Field(None, description="The same. Default: true for a prompt.")
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool = False
    tools: list[FunctionTool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat(self) -> ChatBody:
        """The chat whose prompt is asked for."""
        names = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
        return ChatBody.model_validate({name: getattr(self, name) for name in names})


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[StrictInt]


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> JSONResponse:
    """The token ids of a text or a chat."""
    given = [name for name in ("content", "prompt", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise invalid(f"one of content, prompt and messages is wanted, but there is {' and '.join(given) or 'none'}")
    worker: Worker = await request.app.state.models.get(body.model)
    tokens = await asyncio.to_thread(_tokens, body, worker, request.app.state.settings)
    answer = {"tokens": tokens, "count": len(tokens), "max_model_len": worker.max_context}
    return JSONResponse(answer, headers=ignored_header(body))


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> JSONResponse:
    """The text of token ids, as `content` and as `prompt`."""
    worker: Worker = await request.app.state.models.get(body.model)
    if bad := [token for token in body.tokens if not 0 <= token < worker.vocab_size]:
        raise invalid(f"tokens: {bad[0]} is no token, the vocabulary has {worker.vocab_size}", param="tokens")
    text = await asyncio.to_thread(worker.tokenizer.decode, body.tokens)
    return JSONResponse({"content": text, "prompt": text}, headers=ignored_header(body))


def _tokens(body: TokenizeBody, worker: Worker, settings: Settings) -> list[int]:
    if body.messages is not None:
        ask = body.chat().ask(settings)
        return rendered(worker.tokenizer, ask.messages, ask.offered, ask.options, settings.tool_parser).tokens
    if body.content is None:
        return worker.tokenizer.encode(body.prompt or "", body.add_special_tokens)
    special = body.add_special if body.add_special_tokens is None else body.add_special_tokens
    return worker.tokenizer.encode(body.content, special)
