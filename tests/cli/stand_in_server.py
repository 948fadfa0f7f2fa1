"""A server that speaks just enough of OpenAI's API to be measured, and misbehaves when told to."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class StandIn:
    """What it has been sent, and how it answers."""

    address: str = ""
    key: str | None = None
    gap: float = 0.0  # seconds before each piece of text
    one_by_one: bool = False
    ends_after: int | None = None  # tokens, whatever was asked for
    counts: bool = True  # whether it says how many tokens there were
    text_alone: bool = False  # whether it refuses token ids
    # What becomes of the request of that number, the one that warms up being 0.
    trouble: dict[int, str] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    async def models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"object": "list", "data": [{"id": "stand-in"}]})

    async def answer(self, request: Request) -> Response:
        number = len(self.bodies)
        self.bodies.append(await request.json())
        self.paths.append(request.url.path)
        trouble = self.trouble.get(number)
        if trouble == "full":
            return JSONResponse({"error": {"message": "the queue is full", "type": "rate_limit_error"}}, 429)
        if self.text_alone and "prompt" in self.bodies[number]:
            return Response("prompt: must be a string", 400)
        return self._refusal(request) or StreamingResponse(
            self._events(self.bodies[number], trouble), media_type="text/event-stream"
        )

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "wrong API key"}}, 401)

    async def _events(self, body: dict[str, Any], trouble: str | None) -> Any:
        chat = "messages" in body
        length = min(body["max_tokens"], self.ends_after or body["max_tokens"])
        if self.one_by_one:
            await self._turn.acquire()
        yield ": keepalive\n\n"
        if chat:
            yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number in range(length):
            await asyncio.sleep(self.gap)
            if number == 1 and trouble == "breaks":
                break
            if number == 1 and trouble == "error":
                yield _event({"error": {"message": "out of memory"}})
                break
            if number == 1 and trouble == "garbage":
                yield "data: {not json\n\n"
                break
            yield _event({"choices": [{"index": 0, "delta": {"content": "x"}} if chat else {"index": 0, "text": "x"}]})
        else:
            last = {"delta": {}} if chat else {"text": ""}
            yield _event({"choices": [{"index": 0, **last, "finish_reason": "length"}]})
            prompt = body["messages"][0]["content"].split() if chat else body["prompt"]
            usage = {"prompt_tokens": len(prompt), "completion_tokens": length}
            if self.counts:
                yield _event({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 3}}})
            yield "data: [DONE]\n\n"
        if self.one_by_one:
            self._turn.release()

    @contextmanager
    def running(self) -> Iterator["StandIn"]:
        self._turn = asyncio.Semaphore(1)
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
        ]
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="critical"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        self.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
