"""A live server over the built-in model, in a thread of this process, on a port of its own."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch

from gfxlm import load
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.models.base import CausalLM
from gfxlm.server.app import create_app
from gfxlm.server.metrics import Metrics
from gfxlm.server.opening import Opening
from gfxlm.server.registry import Models, ModelSpec
from gfxlm.server.run import Server
from gfxlm.server.settings import Settings
from gfxlm.server.worker import Worker

Loaded = tuple[CausalLM, Tokenizer]


@dataclass
class LiveServer:
    """`url` is where it listens, `worker` its (first) model's."""

    url: str
    models: Models
    settings: Settings
    server: Server
    thread: threading.Thread

    @property
    def worker(self) -> Worker:
        return next(iter(self.models.loaded.values()))

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(**{"base_url": self.url, "timeout": 60, **options})

    def wait(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Until something is so; fails where it does not come."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.005)


@contextlib.contextmanager
def serving(specs: Sequence[ModelSpec], *, tls: dict[str, Any] | None = None, **options: Any) -> Iterator[LiveServer]:
    """A server of these models; `options` are those of `Settings`."""
    settings = Settings(**{"max_tokens": 16, "shutdown_timeout": 5.0, **options})
    metrics = Metrics()
    models = Models(specs, settings, metrics)
    server = Server(create_app(models, settings, metrics), **(tls or {}))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    scheme = "https" if tls else "http"
    live = LiveServer(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", models, settings, server, thread)
    try:
        live.wait(lambda: models.health != "loading", 60)
        yield live
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


def alone(loaded: Loaded) -> Loaded:
    """What a worker's thread loads, with no more threads than the tests' own has."""
    torch.set_num_threads(1)  # which counts for this thread
    return loaded


@pytest.fixture(scope="session")
def builtin() -> Loaded:
    return load("builtin")


@pytest.fixture(scope="session")
def make_spec(builtin: Loaded) -> Callable[..., ModelSpec]:
    """The built-in model, which all servers of a session share, under a name; the keywords are those of `Opening`."""

    def make(name: str = "builtin", **options: Any) -> ModelSpec:
        opening = Opening(**options)
        return ModelSpec(
            name=name, aliases=frozenset({"alias"}), load=lambda: alone(builtin), make_engine=opening.make_engine
        )

    return make


@pytest.fixture(scope="session")
def server(make_spec: Callable[..., ModelSpec]) -> Iterator[LiveServer]:
    """One server for all tests that leave it as it is."""
    with serving([make_spec()]) as live:
        yield live
