"""POST /v1/completions: text that goes on from a prompt."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictBool

from gfxlm.engine.params import MAX_TOP_LOGPROBS
from gfxlm.server.connection import while_connected
from gfxlm.server.errors import invalid
from gfxlm.server.fields import Body, ignored_header
from gfxlm.server.generation import Generation, Piece, joined, merged
from gfxlm.server.prompts import Prompts, as_tokens, listed
from gfxlm.server.sampling import SamplingFields
from gfxlm.server.settings import Settings
from gfxlm.server.sse import DONE, stream
from gfxlm.server.structure import StructureFields
from gfxlm.server.usage import usage
from gfxlm.server.worker import Worker

if TYPE_CHECKING:
    from gfxlm.engine.logprobs import TokenLogprob

router = APIRouter()
MOST_TEXTS = 128


class StreamOptions(Body):
    """What a stream has besides text."""

    include_usage: StrictBool = Field(False, description="A last chunk says how many tokens there were.")


class CompletionBody(SamplingFields, StructureFields):
    """OpenAI's fields, and those of `SamplingFields` and `StructureFields`."""

    model: str | None = None
    prompt: Prompts
    n: int = Field(1, ge=1, le=MOST_TEXTS, description="Texts for each prompt.")
    best_of: int | None = Field(None, description="Only as many as n.")
    echo: StrictBool = Field(False, description="The text begins with the prompt.")
    suffix: str | None = Field(None, description="Not supported.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")

    def check(self) -> None:
        """Raise ApiError 400 for what cannot be done."""
        if self.suffix:
            raise invalid("suffix: not supported; text is only ever added at the end", param="suffix")
        if self.best_of not in (None, self.n):
            raise invalid("best_of: not supported, except as many as n", param="best_of")
        if self.echo and self.logprobs is not None:
            raise invalid("echo with logprobs: log probabilities of a prompt are not supported", param="echo")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options: only with stream", param="stream_options")


@router.post("/v1/completions", response_model=None)
@router.post("/completions", response_model=None, include_in_schema=False)
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Go on from each prompt."""
    body.check()
    settings: Settings = request.app.state.settings
    worker: Worker = await request.app.state.models.get(body.model)
    prompts = await as_tokens(worker, body.prompt)
    if len(prompts) * body.n > (most := min(MOST_TEXTS, settings.capacity)):
        raise invalid(f"{len(prompts)} prompts, {body.n} texts each: at most {most} in all", param="n")
    params = body.params(worker, settings, top_logprobs=body.logprobs, grammar=body.structure())
    await worker.check(params.grammar, param=body.structured_by())
    started = [one for prompt in prompts for one in body.start(worker, settings, prompt, params, body.n)]
    answer = _Answer(body, worker, started)
    headers = ignored_header(body)
    if body.stream:
        return stream(answer.events(), request, settings.keepalive_seconds, headers)
    return JSONResponse(await while_connected(request, answer.whole()), headers=headers)


class _Answer:
    """The texts of one request, as a whole and in chunks."""

    def __init__(
        self,
        body: CompletionBody,
        worker: Worker,
        generations: Sequence[Generation],
    ) -> None:
        self._body, self._tokenizer, self._generations = body, worker.tokenizer, generations
        self._frame = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": worker.name,
        }
        self._echoes = [self._echoed(prompt) for prompt in listed(body.prompt) for _ in range(body.n)]
        self._offsets = [0] * len(generations)  # where the next token's text begins

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that comes at once."""
        pieces: list[list[Piece]] = [[] for _ in self._generations]
        async with aclosing(merged(self._generations)) as coming:
            async for i, piece in coming:
                pieces[i].append(piece)
        choices = [self._choice(i, joined(parts)) for i, parts in enumerate(pieces)]
        return self._frame | {"choices": choices} | self._ending()

    async def events(self) -> AsyncIterator[str]:
        """The chunks of an answer that comes as it is made."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        remaining = len(self._generations)
        async with aclosing(merged(self._generations)) as coming:
            async for i, piece in coming:
                if not (piece.text or piece.tokens or piece.finish_reason):
                    continue
                remaining -= piece.finish_reason is not None
                chunk = self._frame | {"choices": [self._choice(i, piece)]}
                if with_usage:
                    chunk["usage"] = None
                if not remaining:
                    chunk["timings"] = self._generations[0].timings
                yield json.dumps(chunk)
        if with_usage:
            yield json.dumps(self._frame | {"choices": []} | self._ending())
        yield DONE

    def _ending(self) -> dict[str, Any]:
        return {
            "usage": usage(self._generations, self._body.n),
            "timings": self._generations[0].timings,
        }

    def _echoed(self, prompt: str | list[int]) -> str:
        if not self._body.echo:
            return ""
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _choice(self, i: int, piece: Piece) -> dict[str, Any]:
        echo, self._echoes[i] = self._echoes[i], ""
        return {
            "index": i,
            "text": echo + piece.text,
            "logprobs": None if self._body.logprobs is None else self._logprobs(i, piece),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, i: int, piece: Piece) -> dict[str, Any]:
        tokens = [self._text(logprob.token) for logprob in piece.logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[i])
            self._offsets[i] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [logprob.logprob for logprob in piece.logprobs],
            "top_logprobs": [self._top(logprob) for logprob in piece.logprobs],
            "text_offset": offsets,
        }

    def _top(self, logprob: "TokenLogprob") -> dict[str, float]:
        """By text; of two tokens with the same text, such as halves of a character, the likelier one counts."""
        best: dict[str, float] = {}
        for token, value in logprob.top:
            best.setdefault(self._text(token), value)
        return best

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])
