"""One request as its two sides see it: the engine's thread puts pieces out, the event loop takes them."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gfxlm.engine.params import SamplingParams
from gfxlm.engine.text import TextStream
from gfxlm.server.errors import ApiError

if TYPE_CHECKING:
    from gfxlm.engine.logprobs import TokenLogprob
    from gfxlm.engine.request import Request
    from gfxlm.server.metrics import RequestMetrics

# What the HTTP request being answered has started: its log line counts their tokens, and none outlives it.
started: ContextVar["list[Generation] | None"] = ContextVar("started", default=None)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step settled, or several if nobody asked in between. End-of-text tokens are not among `tokens`.

    `logprobs` has one entry for each token where they were asked for. The last piece has a `finish_reason`, and the
    `stop` string that ended the text, if one did.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple["TokenLogprob", ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    stop: str | None = None


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces that follow each other as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(logprob for piece in pieces for logprob in piece.logprobs),
        pieces[-1].finish_reason,
        pieces[-1].stop,
    )


class Job:
    """A request on its way. The engine's thread owns `request` and `stream`, the loop what `put` touches."""

    def __init__(
        self, prompt: Sequence[int], params: SamplingParams, timeout: float | None, stream: TextStream
    ) -> None:
        self.prompt, self.params, self.timeout, self.stream = prompt, params, timeout, stream
        self.loop = asyncio.get_running_loop()
        self.request: Request | None = None
        self.metrics: RequestMetrics | None = None
        self.cancelled = False
        self.arrived = time.monotonic()
        self.first = self.last = 0.0  # when tokens came
        self.generated = 0
        self.pieces: list[Piece] = []
        self.error: ApiError | None = None
        self.ended = False
        self.ready = asyncio.Event()

    def put(self, item: Piece | ApiError) -> None:
        """In the loop's thread: what the engine has to say."""
        if isinstance(item, ApiError):
            self.error = item
        else:
            self.pieces.append(item)
        self.ended = isinstance(item, ApiError) or item.finish_reason is not None
        self.ready.set()

    def count_token(self) -> None:
        """In the engine's thread: a token has come."""
        self.last = time.monotonic()
        if not self.generated:
            self.first = self.last
        self.generated += 1


class Generation:
    """The pieces of one text as they come. Raises ApiError where it fails; dropping it, or `cancel`, ends it."""

    def __init__(self, model: str, job: Job, cancel: Callable[[Job], None]) -> None:
        self.model = model
        self._job = job
        self._cancel = cancel
        if (others := started.get()) is not None:
            others.append(self)

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        job = self._job
        while (piece := self.take()) is None:
            if job.ended:
                raise StopAsyncIteration
            job.ready.clear()
            await job.ready.wait()
        return piece

    def take(self) -> Piece | None:
        """What has come since it was last asked for, if anything has. Raises ApiError once there is nothing else."""
        job = self._job
        if job.pieces:
            pieces, job.pieces = job.pieces, []
            return joined(pieces)
        if job.error is not None:
            raise job.error
        return None

    def announce(self, news: asyncio.Event) -> None:
        """Set this event, and no other, whenever there is something to take, or nothing more will come."""
        self._job.ready = news
        news.set()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come than can be taken now."""
        return self._job.ended

    def cancel(self) -> None:
        """End it within a step; what has come can still be read."""
        if not self._job.ended:
            self._job.ended = True
            self._job.ready.set()
            self._cancel(self._job)

    def __del__(self) -> None:
        self.cancel()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._job.prompt)

    @property
    def cached_tokens(self) -> int:
        """How many of them were in the prefix cache."""
        return self._job.request.cached if self._job.request is not None else 0

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far, an end-of-text token among them."""
        return self._job.generated

    @property
    def timings(self) -> dict[str, float]:
        """Counts, milliseconds and tokens a second so far, as llama.cpp's server names them."""
        job = self._job
        begun = job.arrived if job.request is None or job.request.started is None else job.request.started
        read = len(job.prompt) - self.cached_tokens
        prompt_ms = max(0.0, job.first - begun) * 1e3
        predicted_ms = (job.last - job.first) * 1e3
        return {
            "cache_n": self.cached_tokens,
            "prompt_n": read,
            "prompt_ms": prompt_ms,
            "prompt_per_second": read / prompt_ms * 1e3 if prompt_ms else 0.0,
            "predicted_n": job.generated,
            "predicted_ms": predicted_ms,
            # The first token came with the prompt.
            "predicted_per_second": (job.generated - 1) / predicted_ms * 1e3 if predicted_ms else 0.0,
        }


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several texts, each with its text's number, as they come. Ends all of them when it is closed."""
    news = asyncio.Event()  # one for all: a task for each piece would cost more than the piece
    for generation in generations:
        generation.announce(news)
    running = dict(enumerate(generations))
    try:
        while running:
            await news.wait()
            news.clear()
            for i, generation in list(running.items()):
                if (piece := generation.take()) is not None:
                    news.set()  # it may have ended with this piece, or have more by the time that we are asked again
                    yield i, piece
                elif generation.ended:
                    del running[i]
    finally:
        for generation in generations:
            generation.cancel()
