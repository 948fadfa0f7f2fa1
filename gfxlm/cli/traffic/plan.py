"""What is sent, and when: prompts of random tokens, arrivals of a Poisson process, both from one seed."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any

# Ordinary tokens of every tokenizer at hand: bytes and control tokens come before these, special tokens after.
_TOKEN_IDS = range(1000, 5000)
# Short words that most tokenizers know whole, for routes that take text alone.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information"
)


class Endpoint(StrEnum):
    """The two routes that every such server has."""

    COMPLETIONS = "completions"
    CHAT = "chat"


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests of which size, and how they arrive.

    `rate` is in requests a second, infinite for as fast as `concurrency` (None: without limit) allows. The first
    `shared_prefix` tokens of every prompt are the same.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    rate: float = math.inf
    concurrency: int | None = None
    shared_prefix: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: when it arrives, in seconds after the first, and the body that asks for it."""

    arrival: float
    body: Mapping[str, Any]


def plan(load: Load, model: str, endpoint: Endpoint) -> list[Planned]:
    """The requests in the order of their arrival; the same for the same seed."""
    chance = random.Random(load.seed)
    # A Poisson process has exponential gaps (Kingman, Poisson Processes, 1993, section 4.1); the first comes at once.
    gaps = [0.0 if load.rate == math.inf else chance.expovariate(load.rate) for _ in range(load.requests - 1)]
    shared = _prompt(chance, endpoint, load.shared_prefix)
    return [
        Planned(arrival, _body(load, model, endpoint, shared + _prompt(chance, endpoint, _own(load))))
        for arrival in accumulate(gaps, initial=0.0)
    ]


def warm_up(load: Load, model: str, endpoint: Endpoint) -> Mapping[str, Any]:
    """The body of one request like the others, with a prompt that none of them begins with."""
    chance = random.Random(f"warm-up {load.seed}")
    return _body(load, model, endpoint, _prompt(chance, endpoint, load.input_tokens))


def _own(load: Load) -> int:
    return load.input_tokens - load.shared_prefix


def _prompt(chance: random.Random, endpoint: Endpoint, length: int) -> list[Any]:
    return chance.choices(_TOKEN_IDS if endpoint is Endpoint.COMPLETIONS else _WORDS.split(), k=length)


def _body(load: Load, model: str, endpoint: Endpoint, prompt: list[Any]) -> Mapping[str, Any]:
    """Greedy, streamed, with usage, and on to its full length where the server knows how (`ignore_eos`, vLLM's)."""
    content: dict[str, Any] = {"prompt": prompt}
    if endpoint is Endpoint.CHAT:
        content = {"messages": [{"role": "user", "content": " ".join(prompt)}]}
    return content | {
        "model": model,
        "max_tokens": load.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
