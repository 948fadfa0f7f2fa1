"""POST /v1/embeddings: texts as vectors."""

import asyncio
import base64
import struct
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from gfxlm.server.connection import while_connected
from gfxlm.server.errors import ApiError, invalid
from gfxlm.server.fields import Body, ignored_header
from gfxlm.server.prompts import Prompts, as_tokens
from gfxlm.server.worker import Worker

router = APIRouter()
_MOST_INPUTS = 2048


class EmbeddingBody(Body):
    """OpenAI's fields, and how a text's hidden states become one vector."""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="Only as many as the model has.")
    pooling: Literal["mean", "last"] = Field("mean", description="The mean of all hidden states, or the last token's.")
    user: str | None = Field(None, description="Ignored.")


@router.post("/v1/embeddings")
@router.post("/embeddings", include_in_schema=False)
async def create_embeddings(body: EmbeddingBody, request: Request) -> JSONResponse:
    """A vector of length 1 for each input."""
    worker: Worker = await request.app.state.models.get(body.model)
    if body.dimensions not in (None, worker.hidden_size):
        raise invalid(
            f"dimensions: this model's vectors have {worker.hidden_size}, and are not shortened", param="dimensions"
        )
    prompts = await as_tokens(worker, body.input, param="input")
    if len(prompts) > _MOST_INPUTS:
        raise invalid(f"input: {len(prompts)} texts, at most {_MOST_INPUTS} can be sent at a time", param="input")
    limit = request.app.state.settings.request_timeout
    try:
        async with asyncio.timeout(limit):
            vectors = await while_connected(request, worker.embed(prompts, pooling=body.pooling))
    except TimeoutError as error:
        raise ApiError(504, f"the time limit of {limit:g} s has passed") from error
    tokens = sum(map(len, prompts))
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
            for i, vector in enumerate(vectors)
        ],
        "model": worker.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return JSONResponse(answer, headers=ignored_header(body))


def _encoded(vector: list[float], form: Literal["float", "base64"]) -> Any:
    """As numbers, or as little-endian fp32 in base64."""
    return vector if form == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
