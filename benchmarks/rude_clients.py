"""Clients that ask, leave, set deadlines and send nonsense, and that know what the right answers are."""

import asyncio
import itertools
import json
import random
import shutil
import tempfile
import textwrap
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from inspect import getsource
from typing import Any

import httpx

MAX_BODY = 64 << 10  # bytes that the server takes
PATIENCE = 120.0  # seconds after which an answer counts as lost
TOKENS = 16  # of an answer whose text is known
CLOSE = 0.25  # between the log probabilities of two tokens that bfloat16 roundings may turn over
_SOURCES = (textwrap, shutil, tempfile)
_GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": TOKENS, "ignore_eos": True}


@dataclass(frozen=True)
class Reference:
    """A prompt's answer alone: where its tokens begin, and by how much each was likelier than the next best."""

    prompt: str
    text: str
    offsets: tuple[int, ...]
    margins: tuple[float, ...]

    @classmethod
    def of(cls, prompt: str, choice: dict[str, Any]) -> "Reference":
        logprobs = choice["logprobs"]
        tops = [sorted(top.values(), reverse=True) for top in logprobs["top_logprobs"]]
        margins = tuple(top[0] - top[1] if len(top) > 1 else 0.0 for top in tops)
        offsets = logprobs["text_offset"]
        return cls(prompt, choice["text"], tuple(offset - offsets[0] for offset in offsets), margins)

    def gap(self, text: str) -> float:
        """0 where the text is the same; else how clear the choice was at which it is another."""
        if text == self.text:
            return 0.0
        pairs = zip(text, self.text, strict=False)
        same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(text), len(self.text)))
        return self.margins[bisect_right(self.offsets, same) - 1]


def prompts() -> list[str]:
    """Prompts in families: each family has its beginning, of a hundred tokens, in common."""
    beginnings = [getsource(module)[:400] for module in _SOURCES]
    endings = ("\n\ndef copy(", "\n\nclass Reader:\n", "\n\nimport ", "\n\n# The following")
    return [beginning + ending for beginning, ending in itertools.product(beginnings, endings)]


@dataclass
class Soak:
    """The clients' side: what they did, by name and how it ended, and what went wrong."""

    client: httpx.AsyncClient
    references: list[Reference]
    exact: bool
    random: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    parted: int = 0

    def fault(self, text: str) -> None:
        self.faults.append(text)

    async def run_client(self, end: float) -> None:
        """One request after the other until the time is over."""
        names, weights = zip(*((act, weight) for act, weight in _ACTS.items()), strict=True)
        while time.monotonic() < end:
            act: Act = self.random.choices(names, weights)[0]
            name = act.__name__.strip("_")
            try:
                outcome = await asyncio.wait_for(act(self), PATIENCE)
            except TimeoutError:
                self.fault(f"{name}: no answer within {PATIENCE:g} s")
                return
            except httpx.HTTPError as error:
                self.fault(f"{name}: {type(error).__name__}: {error}")
                outcome = "broke"
            self.counts[f"{name}: {outcome}"] += 1
            if outcome == "busy":
                await asyncio.sleep(self.random.uniform(0.1, 1.0))

    def judge(self, reference: Reference, text: str) -> str:
        """Hold an answer against what it has to be."""
        gap = reference.gap(text)
        if text == reference.text:
            return "right"
        if self.exact or gap > CLOSE:
            self.fault(f"wrong answer, {gap:.3f} apart:\n  {text!r}\n  {reference.text!r}")
            return "wrong"
        self.parted += 1
        return "right"

    async def stream(self, body: dict[str, Any], most: float = float("inf")) -> tuple[str, int, str]:
        """Text, status and finish reason of a streamed completion; leaves after `most` chunks."""
        texts: list[str] = []
        reason = ""
        async with self.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            if response.status_code != 200:
                self.check_refusal(response.status_code, await response.aread())
                return "", response.status_code, reason
            async for line in response.aiter_lines():
                if len(texts) >= most:
                    return "".join(texts), 200, "left"
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return "".join(texts), 200, str(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    texts.append(choice["text"])
                    reason = choice["finish_reason"] or reason
        return "".join(texts), 200, reason

    def check_refusal(self, status: int, content: bytes) -> None:
        """Every refusal is OpenAI's error object, and none is the server's fault but a deadline that was asked for."""
        try:
            if not json.loads(content)["error"]["message"]:
                self.fault(f"{status} says nothing: {content!r}")
        except (ValueError, LookupError, TypeError):
            self.fault(f"{status} is no error object: {content[:300]!r}")
        if status >= 500 and status != 504:
            self.fault(f"{status}: {content[:300]!r}")


Act = Callable[[Soak], Awaitable[str]]


def _body(soak: Soak) -> tuple[Reference, dict[str, Any]]:
    reference = soak.random.choice(soak.references)
    return reference, {"prompt": reference.prompt, **_GREEDY}


def _sampled(soak: Soak, tokens: int) -> dict[str, Any]:
    """A prompt that nobody has asked yet, with a beginning that many have."""
    beginning = soak.random.choice(soak.references).prompt
    text = beginning[: soak.random.randrange(50, len(beginning))] + str(soak.random.random())
    return {"prompt": text, "max_tokens": tokens, "temperature": 1.0, "top_p": 0.95}


async def streams(soak: Soak) -> str:
    reference, body = _body(soak)
    text, status, reason = await soak.stream(body)
    if status != 200:
        return _refused(soak, status, {429})
    if reason != "length":
        soak.fault(f"a stream ended with {reason!r} after {text!r}")
    return soak.judge(reference, text)


async def asks(soak: Soak) -> str:
    reference, body = _body(soak)
    response = await soak.client.post("/v1/completions", json=body)
    if response.status_code != 200:
        soak.check_refusal(response.status_code, response.content)
        return _refused(soak, response.status_code, {429})
    choice = response.json()["choices"][0]
    if choice["finish_reason"] != "length":
        soak.fault(f"an answer ended with {choice['finish_reason']!r}")
    return soak.judge(reference, choice["text"])


async def chats(soak: Soak) -> str:
    body = _sampled(soak, soak.random.randrange(1, 24))
    body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    response = await soak.client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        soak.check_refusal(response.status_code, response.content)
        return _refused(soak, response.status_code, {429})
    return "done"


async def leaves_a_stream(soak: Soak) -> str:
    _, status, reason = await soak.stream(_sampled(soak, 200), most=soak.random.randrange(1, 20))
    return reason if status == 200 else _refused(soak, status, {429})


async def leaves_while_waiting(soak: Soak) -> str:
    asking = soak.client.post("/v1/completions", json=_sampled(soak, 200))
    try:
        response = await asyncio.wait_for(asking, soak.random.uniform(0.001, 1.0))
    except TimeoutError:
        return "left"
    if response.status_code == 200:
        return "done"
    soak.check_refusal(response.status_code, response.content)
    return _refused(soak, response.status_code, {429})


async def sets_a_deadline(soak: Soak) -> str:
    body = _sampled(soak, 100) | {"timeout": soak.random.choice((0.01, 0.1, 0.5))}
    if soak.random.random() < 0.5:
        _, status, reason = await soak.stream(body)
        if status == 200:
            return "in time" if reason in ("stop", "length") else "late"
    else:
        response = await soak.client.post("/v1/completions", json=body)
        status = response.status_code
        if status == 200:
            return "in time"
        soak.check_refusal(status, response.content)
    return "late" if status == 504 else _refused(soak, status, {429})


async def sends_too_much(soak: Soak) -> str:
    content = json.dumps({"prompt": "x" * (MAX_BODY + soak.random.randrange(1, 1 << 20))}).encode()
    response = await soak.client.post("/v1/completions", content=content, headers=_JSON)
    soak.check_refusal(response.status_code, response.content)
    return _refused(soak, response.status_code, {413})


_JSON = {"Content-Type": "application/json"}
_WRONG: Sequence[tuple[str, bytes, int]] = (
    ("/v1/completions", b'{"prompt": "a', 400),
    ("/v1/completions", b'{"prompt": "\xff\xfe"}', 400),
    ("/v1/completions", b"[1, 2]", 400),
    ("/v1/completions", b"", 400),
    ("/v1/completions", b"[" * 20000, 400),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": -1}', 400),
    ("/v1/completions", b'{"prompt": "a", "temperature": "hot"}', 400),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
    ("/v1/completions", b'{"prompt": [999999999]}', 400),
    ("/v1/completions", b'{"prompt": []}', 400),
    ("/v1/completions", b'{"prompt": "a", "n": 1000000}', 400),
    ("/v1/completions", b'{"prompt": "' + b"a b " * 8000 + b'"}', 400),
    ("/v1/completions", b'{"prompt": "a", "model": "nobody"}', 404),
    ("/v1/completions", b'{"prompt": "\\ud800"}', 400),
    ("/v1/chat/completions", b'{"messages": []}', 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "king", "content": "x"}]}', 400),
    ("/v1/nothing", b"{}", 404),
)


async def sends_nonsense(soak: Soak) -> str:
    path, content, wanted = soak.random.choice(_WRONG)
    response = await soak.client.post(path, content=content, headers=_JSON)
    soak.check_refusal(response.status_code, response.content)
    if response.status_code not in (wanted, 429):
        soak.fault(f"{content[:80]!r} to {path}: {response.status_code} instead of {wanted}: {response.text[:200]}")
    return str(response.status_code)


def _refused(soak: Soak, status: int, allowed: set[int]) -> str:
    if status not in allowed:
        soak.fault(f"refused with {status}")
    return "busy" if status == 429 else str(status)


_ACTS: dict[Act, int] = {
    streams: 30,
    asks: 20,
    chats: 6,
    leaves_a_stream: 14,
    leaves_while_waiting: 8,
    sets_a_deadline: 8,
    sends_too_much: 4,
    sends_nonsense: 10,
}


async def references(client: httpx.AsyncClient) -> list[Reference]:
    """Every prompt's answer, one after the other."""
    found = []
    for prompt in prompts():
        response = await client.post("/v1/completions", json={"prompt": prompt, "logprobs": 2, **_GREEDY})
        found.append(Reference.of(prompt, response.raise_for_status().json()["choices"][0]))
    return found
