"""The process: sockets, uvicorn, which listens while the first model loads, and an end in order."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gfxlm.errors import UserError
from gfxlm.server import logs
from gfxlm.server.app import create_app
from gfxlm.server.errors import ApiError
from gfxlm.server.metrics import Metrics
from gfxlm.server.registry import Models, ModelSpec
from gfxlm.server.settings import Settings

log = logging.getLogger("gfxlm.server")
# For what is left to be said after requests were cut off.
_LAST_WORDS = 5.0
_BACKLOG = 2048
# How long a thread may keep the interpreter while others want it. Python's 5 ms, for a template that is being rendered,
# would be longer than a step of the engine, which waits for it again and again.
_SWITCH_SECONDS = 0.0005


class Server(uvicorn.Server):
    """Ends at SIGINT and SIGTERM: takes no more requests, finishes those that end in time, cuts off the others."""

    def __init__(self, app: FastAPI, *, ssl_keyfile: Path | None = None, ssl_certfile: Path | None = None) -> None:
        self._models: Models = app.state.models
        self._settings: Settings = app.state.settings
        config = uvicorn.Config(
            app,
            ssl_keyfile=ssl_keyfile,
            ssl_certfile=ssl_certfile,
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=int(self._settings.shutdown_timeout + _LAST_WORDS) + 1,
        )
        config.load()  # here, where a bad certificate raises
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have signals end the server; unlike with uvicorn's own, the process then exits with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are for the main thread
            return
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests end by themselves for a while."""
        log.info("ending")
        self._models.stop()
        self._loop = asyncio.get_running_loop()
        timer = self._loop.call_later(self._settings.shutdown_timeout, self._cut_off)
        await super().shutdown(sockets)
        timer.cancel()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """At the second signal answers under way have no more time."""
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cut_off)

    def _cut_off(self) -> None:
        self._models.cut_off(ApiError(503, "the server is shutting down"))


def run(
    specs: Sequence[ModelSpec],
    settings: Settings,
    *,
    host: str,
    port: int,
    ssl_keyfile: Path | None = None,
    ssl_certfile: Path | None = None,
    log_level: str = "info",
    log_format: str = "text",
    resident: int = 1,
) -> int:
    """Serve until a signal comes, or an engine fails for good; the exit status, 0 or 1.

    Raises UserError where it cannot listen, or the first model cannot be loaded.
    """
    sockets = _listening(host, port)
    logs.configure(log_level, log_format)
    sys.setswitchinterval(_SWITCH_SECONDS)
    metrics = Metrics()
    models = Models(specs, settings, metrics, resident=resident)
    app = create_app(models, settings, metrics)
    try:
        server = Server(app, ssl_keyfile=ssl_keyfile, ssl_certfile=ssl_certfile)
    except OSError as error:
        raise UserError(f"--ssl-certfile, --ssl-keyfile: {error.strerror or error}") from error
    scheme = "http" if ssl_certfile is None else "https"
    for listener in sockets:
        address, bound, *_ = listener.getsockname()
        shown = f"[{address}]" if ":" in address else address
        log.info("listening on %s://%s:%s", scheme, shown, bound)
    asyncio.run(_served(server, models, sockets))
    status = int(models.failed.is_set())
    if models.abandoned:
        # A thread that loads cannot be stopped, and C++ aborts when the interpreter ends under it.
        logging.shutdown()
        os._exit(status)
    return status


async def _served(server: Server, models: Models, sockets: list[socket.socket]) -> None:
    serving = asyncio.ensure_future(server.serve(sockets))
    watching = asyncio.ensure_future(_watched(models))
    await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    if watching.done():
        watching.result()
    watching.cancel()


async def _watched(models: Models) -> None:
    """Return when an engine has failed for good. Raises what loading the first model raised."""
    log.info("%s is loaded", await models.first())
    await models.failed.wait()
    log.error("an engine has failed for good: the process ends, to be started again")


def _listening(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of the host. Raises UserError where there is none to be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        # Any free port is another one for each address.
        return [_bound(family, address) for family, address in (addresses if port else addresses[:1])]
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from error


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(address)
    listener.listen(_BACKLOG)
    return listener
