"""A server with the real page and scripted answers, and a browser to look at it."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gfxlm.server import page

Answer = Callable[[dict[str, Any]], Response]

USAGE = {"prompt_tokens": 96, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 64}}
TIMINGS = {"predicted_per_second": 41.23, "prompt_per_second": 800.0}


@dataclass
class Stub:
    """What the server shall answer, and what it was asked: bodies, and the keys that came with them."""

    answer: Answer
    models: Callable[[], Response] = lambda: JSONResponse(
        {"object": "list", "data": [{"id": "small"}, {"id": "large"}]}
    )
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    disconnects: int = 0
    url: str = ""


def chunk(finish: str | None = None, **delta: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]})}\n\n"


def stream(
    *texts: str,
    pause: float = 0.0,
    stub: Stub | None = None,
    forever: bool = False,
    gate: threading.Event | None = None,
    **first: Any,
) -> Response:
    """These texts as chunks, then counts; with `forever` the last one comes again and again, with a `gate` it waits.

    `stub` counts who left.
    """

    async def events() -> AsyncIterator[str]:
        try:
            yield ": keep-alive\n\n" + chunk(role="assistant", content="", **first)
            for i, text in enumerate(texts):
                while gate and i == len(texts) - 1 and not gate.is_set():
                    await asyncio.sleep(0.01)
                yield chunk(content=text)
                await asyncio.sleep(pause)
            while forever:
                yield chunk(content=texts[-1])
                await asyncio.sleep(pause)
            yield chunk("stop")
            yield f"data: {json.dumps({'choices': [], 'usage': USAGE, 'timings': TIMINGS})}\n\ndata: [DONE]\n\n"
        except asyncio.CancelledError:
            if stub:
                stub.disconnects += 1
            raise

    return StreamingResponse(events(), media_type="text/event-stream")


def refusal(status: int, message: str, **headers: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x"}}, status, headers)


def _application(stub: Stub) -> FastAPI:
    app = FastAPI()
    app.include_router(page.router)

    @app.get("/v1/models")
    def models() -> Response:
        return stub.models()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        stub.bodies.append(await request.json())
        stub.keys.append(request.headers.get("authorization"))
        return stub.answer(stub.bodies[-1])

    return app


@contextmanager
def serving(stub: Stub) -> Iterator[uvicorn.Server]:
    """Serve on a free port, in a thread; `stub.url` is where."""
    config = uvicorn.Config(_application(stub), port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    stub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    yield server
    server.should_exit = True
    thread.join(10)
