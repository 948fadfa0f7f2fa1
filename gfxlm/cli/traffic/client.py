"""The clients: each sends one request, and notes when what came back."""

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import httpx

from gfxlm.cli.traffic.plan import Endpoint, Load, Planned, plan, warm_up
from gfxlm.cli.traffic.sample import Sample
from gfxlm.errors import UserError

_PATHS = {Endpoint.COMPLETIONS: "/v1/completions", Endpoint.CHAT: "/v1/chat/completions"}


class Target:
    """A server, one of its models and one of its routes."""

    def __init__(self, base_url: str, model: str | None, api_key: str | None, endpoint: Endpoint) -> None:
        """`base_url` with or without /v1 at its end. Raises UserError where it is no address."""
        address = base_url.rstrip("/").removesuffix("/v1")
        if not address.startswith(("http://", "https://")):
            raise UserError(f"--base-url: expected an address like http://127.0.0.1:8080, but got {base_url!r}")
        self.address = address
        self.model = model
        self.endpoint = endpoint
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def connect(self) -> httpx.AsyncClient:
        """A client that neither waits for a free connection nor gives up on an answer."""
        return httpx.AsyncClient(
            base_url=self.address,
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=30),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def find_model(self, client: httpx.AsyncClient) -> str:
        """The model asked for, or the first that the server has. Raises UserError where it cannot be asked."""
        if self.model is not None:
            return self.model
        try:
            response = await client.get("/v1/models", timeout=30)
        except httpx.HTTPError as error:
            raise UserError(f"{self.address}: {_reason(error)}; is the server running?") from error
        if response.is_error:
            raise UserError(f"{self.address}/v1/models: HTTP {response.status_code}: {_message(response.text)}")
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{self.address}/v1/models: names no model; choose one with --model") from error


async def run(target: Target, load: Load, progress: Callable[[int, int], None]) -> tuple[str, list[Sample]]:
    """Send one request to warm up, then all of them; the model's name, and a sample of each in order of arrival.

    Arrivals are set beforehand: a slow server gets no rest. Where no rate is given and `concurrency` is, a request
    arrives when one before it has ended. Raises UserError where the first request fails.
    """
    async with target.connect() as client:
        model = await target.find_model(client)
        await _warm_up(client, target, warm_up(load, model, target.endpoint))
        requests = plan(load, model, target.endpoint)
        slots = nullcontext() if load.concurrency is None else asyncio.Semaphore(load.concurrency)
        closed = load.concurrency is not None and load.rate == math.inf
        start, done = time.monotonic(), 0

        async def send(planned: Planned) -> Sample:
            nonlocal done
            sample = Sample(planned.arrival)
            await asyncio.sleep(start + planned.arrival - time.monotonic())
            async with slots:
                if closed:
                    sample.arrival = time.monotonic() - start
                await _stream(client, target.endpoint, planned.body, sample, start)
            done += 1
            progress(done, load.requests)
            return sample

        return model, list(await asyncio.gather(*map(send, requests)))


async def _warm_up(client: httpx.AsyncClient, target: Target, body: Mapping[str, Any]) -> None:
    sample = Sample(0.0)
    await _stream(client, target.endpoint, body, sample, time.monotonic())
    if sample.error is not None:
        hint = "; --endpoint chat sends words, not token ids" if sample.error == "HTTP 400" else ""
        said = f": {sample.message}" if sample.message else ""
        raise UserError(f"{target.address}: the first request failed: {sample.error}{said}{hint}")


async def _stream(
    client: httpx.AsyncClient, endpoint: Endpoint, body: Mapping[str, Any], sample: Sample, start: float
) -> None:
    """Send the request and fill in the sample. Nothing that a server can do raises here."""
    finished = False
    try:
        async with client.stream("POST", _PATHS[endpoint], json=body) as response:
            if response.is_error:
                await response.aread()
                sample.error, sample.message = f"HTTP {response.status_code}", _message(response.text)
            else:
                async for line in response.aiter_lines():
                    now = time.monotonic() - start
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data == "[DONE]":
                        finished = True
                    elif data:
                        _take(data, sample, now)
    except httpx.HTTPError as error:
        sample.error, sample.message = type(error).__name__, _reason(error)
    sample.end = time.monotonic() - start
    if sample.error is None and not (finished and sample.pieces):
        sample.error = "the stream broke off" if not finished else "no text came"
    if sample.error is None and not sample.output_tokens:
        sample.output_tokens = len(sample.pieces)


def _take(data: str, sample: Sample, now: float) -> None:
    """Note what an event says, or that it is none."""
    try:
        event = json.loads(data)
        if event.get("error"):
            sample.error, sample.message = "error in the stream", _message(data)
            return
        if usage := event.get("usage"):
            sample.input_tokens, sample.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if any(_is_text(choice) for choice in event["choices"]):
            sample.pieces.append(now)
    except (ValueError, LookupError, TypeError, AttributeError):
        sample.error, sample.message = "not an event of OpenAI's API", _message(data)


def _is_text(choice: Mapping[str, Any]) -> bool:
    """Whether a piece of an answer, of whatever kind, is in an event; a chat's first one names a role and no more."""
    if "delta" not in choice:
        return "text" in choice and not (choice["text"] == "" and choice.get("finish_reason"))
    delta = choice["delta"]
    return any(delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls"))


def _message(text: str) -> str:
    """What the server said, in one line: the message of OpenAI's error object, if it is one."""
    try:
        error = json.loads(text)["error"]
        text = error if isinstance(error, str) else str(error["message"])
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(text.split())[:300]


def _reason(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
