"""What a streamed token costs in the server alone, without a model.

    python -m benchmarks.stream_rate --streams 32 --rate 8000 [--route chat]

An engine that sleeps and then gives every request a token stands in for a GPU: so many tokens a second in all, for so
many clients, who are a process of their own. Tokens and events a second that reach them, and microseconds of CPU time
a token: of the whole server, and of its engine's thread. They share the interpreter: with more than 1e6 / rate it falls
behind.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from gfxlm import load
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.server.app import create_app
from gfxlm.server.metrics import Metrics
from gfxlm.server.registry import Models, ModelSpec
from gfxlm.server.run import Server
from gfxlm.server.settings import Settings

_TEXT = "The server passes on what the engine says, a token at a time, as quickly as it can.\n"
_ROUTES = {
    "completions": ("/v1/completions", {"prompt": "a"}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": "a"}]}),
    "responses": ("/v1/responses", {"input": "a"}),
}


class PacedEngine:
    """An engine whose steps take a fixed time, in which nobody holds the interpreter."""

    free_positions = positions = 0
    grammars = None

    def __init__(self, tokenizer: Tokenizer, steps_per_second: float) -> None:
        self._tokens = tokenizer.encode(_TEXT, add_special_tokens=False)
        self._seconds = 1 / steps_per_second
        self._due = 0.0
        self._requests: list[Request] = []
        self.cpu_seconds = 0.0  # of the thread that calls it
        self.cache = SimpleNamespace(max_context=1 << 20)

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    @property
    def running(self) -> int:
        return len(self._requests)

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        pass

    def add(self, prompt: Sequence[int], params: SamplingParams, **_: Any) -> Request:
        request = Request(list(prompt), params, started=time.monotonic())
        self._requests.append(request)
        return request

    def finish(self, request: Request) -> None:
        self._requests.remove(request)

    def step(self) -> list[Request]:
        now = time.monotonic()
        time.sleep(max(0.0, self._due - now))
        self._due = max(self._due, now - self._seconds) + self._seconds
        served = self._requests
        for request in served:
            request.tokens.append(self._tokens[len(request.tokens) % len(self._tokens)])
            if len(request.tokens) == request.params.max_tokens:
                request.finish_reason = "length"
        self._requests = [request for request in served if request.finish_reason is None]
        self.cpu_seconds = time.thread_time()
        return served


async def _read(port: int, route: str, tokens: int) -> tuple[float, float, int]:
    """When the first event came and the last one, and how many there were."""
    path, body = _ROUTES[route]
    content = json.dumps({**body, "max_tokens": tokens, "stream": True})
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
    parts = [await reader.read(1 << 16)]
    begun = time.monotonic()
    while part := await reader.read(1 << 20):
        parts.append(part)
    ended = time.monotonic()
    writer.close()
    return begun, ended, b"".join(parts).count(b"data: {")


def _clients(port: int, route: str, streams: int, tokens: int, results: Any) -> None:
    async def all_of_them() -> list[tuple[float, float, int]]:
        return await asyncio.gather(*(_read(port, route, tokens) for _ in range(streams)))

    results.put(asyncio.run(all_of_them()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rate", type=float, default=8000.0, help="tokens a second in all")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--route", choices=list(_ROUTES), default="completions")
    arguments = parser.parse_args()
    model, tokenizer = load("builtin")
    stand_in = SimpleNamespace(config=model.config, generation_config={}, device=torch.device("cpu"))
    engine = PacedEngine(tokenizer, arguments.rate / arguments.streams)
    spec = ModelSpec(name="m", load=lambda: (stand_in, tokenizer), make_engine=lambda *_: engine)  # type: ignore[arg-type,return-value]
    settings, metrics = Settings(max_concurrency=arguments.streams), Metrics()
    models = Models([spec], settings, metrics)
    server = Server(create_app(models, settings, metrics))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    tokens = int(arguments.rate / arguments.streams * arguments.seconds)
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    client = spawn.Process(
        target=_clients, args=(listener.getsockname()[1], arguments.route, arguments.streams, tokens, results)
    )
    client.start()
    while not engine.busy:
        time.sleep(0.01)
    before, engine_before = time.process_time(), engine.cpu_seconds
    streams = results.get()
    cpu, engine_cpu = time.process_time() - before, engine.cpu_seconds - engine_before
    client.join()
    server.should_exit = True
    thread.join()
    total = tokens * arguments.streams
    seconds = max(ended for _, ended, _ in streams) - min(begun for begun, _, _ in streams)
    events = sum(count for _, _, count in streams)
    print(f"{arguments.route}: {total / seconds:.0f} tokens/s, {events / seconds:.0f} events/s of {arguments.rate:.0f}")
    print(
        f"CPU time a token: {cpu / total * 1e6:.0f} µs, {engine_cpu / total * 1e6:.0f} of them in the engine's thread"
    )


if __name__ == "__main__":
    main()
