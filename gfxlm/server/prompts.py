"""Prompts as text or as token ids, one or many."""

import asyncio
from typing import Annotated

from pydantic import Field, StrictInt

from gfxlm.server.errors import invalid
from gfxlm.server.worker import Worker

Tokens = Annotated[list[StrictInt], Field(min_length=1)]
Prompts = str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]


def listed(prompts: Prompts) -> list[str] | list[list[int]]:
    """One or many as many."""
    if isinstance(prompts, str):
        return [prompts]
    return [prompts] if isinstance(prompts[0], int) else prompts


async def as_tokens(worker: Worker, prompts: Prompts, *, param: str = "prompt") -> list[list[int]]:
    """The token ids of each prompt. ApiError 400 for one that is empty."""

    def encode() -> list[list[int]]:
        return [
            worker.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in listed(prompts)
        ]

    # Not in the loop: a long text takes the tokenizer a while.
    encoded = await asyncio.to_thread(encode)
    for i, tokens in enumerate(encoded):
        if not tokens:
            which = f"{param}[{i}]" if len(encoded) > 1 else param
            raise invalid(f"{which} is empty: there must be a token to go on from", param=param)
    return encoded
