"""Who waits, who runs, and what the next step feeds them: all in host integers."""

import time
from collections import deque
from collections.abc import Sequence

from gfxlm.engine.prefix import Prefixes
from gfxlm.engine.request import Request
from gfxlm.errors import BusyError
from gfxlm.nn.cache import Cache


class Scheduler:
    """The queue, the slots of one cache, and the shares of a step.

    Requests start in the order they came, and nobody passes one that waits for room: there is room for each of them
    alone, so that all start in the end. `budget` prompt tokens are fed a step: what a chunk takes, those who decode
    wait longer for their next token. With `one_by_one` chunks depend on a prompt's length alone.
    """

    def __init__(
        self,
        cache: Cache,
        budget: int,
        *,
        prefixes: Prefixes | None = None,
        max_waiting: int | None = None,
        one_by_one: bool = False,
    ) -> None:
        self._cache, self._budget, self._one_by_one = cache, budget, one_by_one
        self._prefixes = prefixes
        self._max_waiting = max_waiting
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free = deque(range(len(cache.lengths)))

    @property
    def free_positions(self) -> int:
        """Of how many positions requests that come may have keys and values."""
        cache = self._cache
        return len(self._free) * cache.places if cache.pages is None else cache.pages.free * cache.pages.size

    def add(self, request: Request) -> None:
        """Queue a request. BusyError where there is a slot for none of `max_waiting` that wait."""
        waiting = len(self.waiting) - len(self._free)
        if self._max_waiting is not None and waiting >= self._max_waiting:
            raise BusyError(f"{len(self.running)} requests run and {len(self.waiting)} wait, which is the limit")
        self.waiting.append(request)

    def start(self) -> Request | None:
        """Give the request that waits longest a slot and room, None where there is neither: others have to leave."""
        if not self.waiting or not self._free:
            return None
        request, slot = self.waiting[0], self._free[0]
        known = () if self._prefixes is None else self._prefixes.find(request)
        if not self._cache.promise(slot, self._positions(request, slot), known):
            return None
        self.waiting.popleft()
        request.slot = self._free.popleft()
        if request.started is None:
            request.started = time.monotonic()
        self.running.append(request)
        return request

    def leave(self, request: Request) -> None:
        """Take a request out, wherever it is. Its slot is the last to be given away again."""
        if request in self.running:
            self.running.remove(request)
            self._free.append(request.slot)
        elif request in self.waiting:
            self.waiting.remove(request)

    def put_back(self, requests: Sequence[Request]) -> None:
        """Let requests that had left wait in front of all others."""
        self.waiting.extendleft(reversed(requests))

    def grow(self) -> None:
        """Take the room that those who decode need for this step and one launched ahead of it: it was promised."""
        for request in self.running:
            if request.tokens:
                self._take_room(request, max(2, len(request.pending)))

    def expired(self) -> list[Request]:
        """Those that have had their time."""
        now = time.monotonic()
        return [request for request in (*self.running, *self.waiting) if request.expired(now)]

    def chunk(self) -> list[tuple[Request, int]]:
        """Whose prompts the next chunk feeds, and how many tokens of each.

        Half of the budget goes to those who came first, and the other half to those who need least: a long prompt
        holds up nobody, and nobody holds up a long one for good.
        """
        feeding = [request for request in self.running if request.feeding]
        chosen = self._together(feeding)
        work = []
        for request, share in zip(chosen, _shares([len(one.pending) for one in chosen], self._budget), strict=True):
            count = share if self._prefixes is None else self._prefixes.cut(request, share)
            if count:
                self._take_room(request, count)
                work.append((request, count))
        return work

    def _together(self, feeding: Sequence[Request]) -> list[Request]:
        """Who may be fed in one chunk. Who would feed what another one is feeding waits for it to be known."""
        if not feeding or self._one_by_one or feeding[0].alone:
            return list(feeding[:1])
        chosen, pages = [], set[bytes]()
        for request in feeding:
            page = None if self._prefixes is None else self._prefixes.next_page(request)
            if not request.alone and page not in pages:
                chosen.append(request)
            pages |= {page} if page else set()
        return chosen

    def _take_room(self, request: Request, positions: int) -> None:
        held, limit = self._cache.lengths[request.slot], self._cache.max_context
        assert self._cache.reserve(request.slot, min(limit, held + positions))

    def _positions(self, request: Request, slot: int) -> int:
        """All that a request may come to have in the cache."""
        before = self._cache.lengths[slot] if request.prefix is None else request.prefix.lengths[0]
        most, limit = request.params.max_tokens, self._cache.max_context
        return limit if most < 0 else min(limit, before + len(request.prompt) + most)


def _shares(wanted: Sequence[int], budget: int) -> list[int]:
    """How much each gets: half of a budget goes to the first in order, the rest from the smallest wish up."""
    shares = [0] * len(wanted)
    by_size = sorted(range(len(wanted)), key=wanted.__getitem__)
    for order, kept in ((range(len(wanted)), budget // 2), (by_size, 0)):
        for number in order:
            share = min(wanted[number] - shares[number], max(0, budget - kept))
            shares[number] += share
            budget -= share
    return shares
