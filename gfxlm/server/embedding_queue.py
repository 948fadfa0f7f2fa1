"""Embeddings that wait, made chunk by chunk between the steps of those who generate."""

import logging
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future

from gfxlm.errors import UserError
from gfxlm.server.errors import ApiError, invalid

log = logging.getLogger("gfxlm.server")

Vectors = list[list[float]]


class EmbeddingQueue:
    """Work in the order in which it came. All in the engine's thread; results go to whoever waits for the future."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Generator[None, None, Vectors], Future[Vectors]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, work: Generator[None, None, Vectors], result: Future[Vectors]) -> None:
        """Queue work: each `next` is a chunk."""
        self._waiting.append((work, result))

    def advance(self) -> bool:
        """Do a chunk of what waits longest; whether that has ended with it. Nothing is done for who has gone."""
        work, result = self._waiting[0]
        if not result.cancelled():
            try:
                next(work)
                return False
            except StopIteration as done:
                _settle(result, done.value)
            except UserError as error:
                _settle(result, invalid(str(error)))
            except Exception:
                log.exception("an embedding failed")
                _settle(result, ApiError(500, "the embedding failed; the server's log says why"))
        self._waiting.popleft()
        return True

    def fail(self, error: ApiError) -> int:
        """End everything with this error; how much that was."""
        count = len(self._waiting)
        while self._waiting:
            _settle(self._waiting.popleft()[1], error)
        return count


def _settle(result: Future[Vectors], outcome: Vectors | ApiError) -> None:
    if not result.set_running_or_notify_cancel():
        return  # nobody waits any longer
    if isinstance(outcome, ApiError):
        result.set_exception(outcome)
    else:
        result.set_result(outcome)
