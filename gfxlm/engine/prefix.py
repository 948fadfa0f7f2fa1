"""What requests leave behind in a cache's pages: whoever begins alike goes on from there."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from gfxlm.engine.request import Request
from gfxlm.errors import UserError
from gfxlm.nn.cache import Cache, RecurrentCache
from gfxlm.nn.pages import Pages


class Prefixes:
    """A cache's full pages, by all the tokens up to their ends, and recurrent states at some of these ends.

    A page is known by the SHA-256 of its parent's digest and its own tokens. Slots share what is known and write only
    behind it, so that nothing is ever copied. A model with recurrent layers can go on only from where a state was
    saved: at the last end of a page in a prompt, where it parts from known pages, and, as long as there is room for
    them, at the ends of its chunks. Of these there are `states`; the one that was of use longest ago makes room.

    Only multiples of `step` positions are shared: with the step of prompts, every chunk is what it would be without.
    """

    def __init__(self, cache: Cache, pages: Pages, *, step: int, states: int = 0) -> None:
        self._cache, self._pages, self._step = cache, pages, step
        self._known: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}  # by page
        recurrent = any(isinstance(layer, RecurrentCache) for layer in cache.layers)
        self._states = SavedStates(cache, states) if recurrent else None
        self.queries = 0  # prompt tokens that came
        self.hits = 0  # and those of them that were there
        pages.dropped = self._drop

    def find(self, request: Request) -> list[int]:
        """The pages that a request can begin with: at least its last token is to be fed, for its logits."""
        pages = self._common(request)
        if self._states is None:
            per_step = self._step // self._pages.size
            return pages[: len(pages) // per_step * per_step]
        while pages and pages[-1] not in self._states:
            pages.pop()
        return pages

    def begin(self, request: Request) -> None:
        """A request has a slot, which shares pages already: let it go on behind them."""
        if request.prefix is None:
            self.queries += len(request.prompt)
            self._go_on(request)

    def advance(self, request: Request) -> None:
        """Let a request whose prompt is being fed go on behind what has become known since it began."""
        if request.prefilled % self._pages.size:
            return
        pages = self.find(request)[request.prefilled // self._pages.size :]
        if pages:
            self._pages.share(request.slot, pages)
            self._go_on(request)

    def next_page(self, request: Request) -> bytes | None:
        """The digest of the page that is fed next, None where it will not be full."""
        number, digests = request.prefilled // self._pages.size, self._digests_of(request)
        return digests[number] if number < len(digests) else None

    def cut(self, request: Request, count: int) -> int:
        """How many of so many tokens to feed, for the chunk to end where others may want to go on."""
        size, end = self._pages.size, request.prefilled + count
        if self._step > size:
            return count
        border = next((border for border in request.borders if request.prefilled < border < end), None)
        if border is None and end < len(request.prompt):
            border = end // size * size
        return border - request.prefilled if border is not None and border > request.prefilled else count

    def fed(self, request: Request) -> None:
        """A chunk of its prompt is in the cache: others may share its full pages, and go on from its end."""
        if request.prefix is not None:
            return
        full = request.prefilled // self._step * self._step
        self._publish(request, full // self._pages.size)
        if self._states is not None and request.prefilled == full > 0:
            page = self._known[self._digests_of(request)[full // self._pages.size - 1]]
            self._states.save(page, request.slot, lasting=full in request.borders)

    def leave(self, request: Request) -> None:
        """A request ends well: what it has generated may be a part of the next prompt."""
        # Of a state nobody can go on from, and of other numbers than a prompt's chunks would be.
        if self._states is not None or self._step > self._pages.size:
            return
        length = min(self._cache.lengths[request.slot], len(request.prompt) + len(request.tokens))
        self._publish(request, length // self._pages.size)

    def forget(self, request: Request) -> None:
        """A request failed: nobody is to go on from what it has computed."""
        for page in request.published:
            if page in self._digests:
                self._pages.forget(page)
        request.published.clear()

    def clear(self) -> None:
        """Forget everything."""
        for page in list(self._digests):
            self._pages.forget(page)

    def _go_on(self, request: Request) -> None:
        length = len(self._pages.held(request.slot)) * self._pages.size
        self.hits += length - request.prefilled
        request.cached += length - request.prefilled
        request.prefilled = self._cache.lengths[request.slot] = length
        if self._states is None:
            return
        if length:
            self._states.load(self._pages.held(request.slot)[-1], request.slot)
        parting = len(self._common(request)) * self._pages.size
        request.borders = sorted({parting, len(request.prompt) // self._pages.size * self._pages.size})

    def _common(self, request: Request) -> list[int]:
        """The known pages of the longest beginning that is known, its last token left out."""
        pages = []
        for digest in self._digests_of(request)[: (len(request.prompt) - 1) // self._pages.size]:
            if digest not in self._known:
                break
            pages.append(self._known[digest])
        return pages

    def _publish(self, request: Request, count: int) -> None:
        """Let the first `count` pages of a request's slot be known, as far as others with the same text are not."""
        held = self._pages.held(request.slot)
        for page, digest in list(zip(held, self._digests_of(request), strict=False))[:count]:
            if digest not in self._known:
                self._known[digest], self._digests[page] = page, digest
                self._pages.keep(page)
                request.published.append(page)

    def _digests_of(self, request: Request) -> list[bytes]:
        """Of all full pages of a request's text, none where it goes on from a cache of its own."""
        if request.prefix is not None:
            return []
        size, digests = self._pages.size, request.digests
        text = len(request.prompt) + len(request.tokens)
        if text // size > len(digests):
            tokens = [*request.prompt, *request.tokens]
            for start in range(len(digests) * size, text - size + 1, size):
                parent = digests[-1] if digests else b""
                digests.append(hashlib.sha256(parent + array("q", tokens[start : start + size]).tobytes()).digest())
        return digests

    def _drop(self, page: int) -> None:
        """A page is forgotten."""
        del self._known[self._digests.pop(page)]
        if self._states is not None:
            self._states.drop(page)


def prefixes_of(cache: Cache, *, own: bool, step: int | None, states: int) -> Prefixes:
    """The prefix cache of an engine's `own` cache. UserError for one that cannot be shared, and for such a step."""
    if not own or cache.pages is None:
        raise UserError("prefix_cache: an engine shares only what lies in a cache of its own")
    if cache.ring is not None:
        raise UserError("prefix_cache: a cache that forgets (max_kv_size) cannot be shared")
    size = cache.pages.size
    if step is not None and step % size:
        raise UserError(
            f"prefix_cache: with batch_invariant, prefill_step_size must be a multiple of {size}, but is {step}"
        )
    return Prefixes(cache, cache.pages, step=step or size, states=states)


class SavedStates:
    """The recurrent states of up to `count` texts, each by the page that it goes with, in tensors of fixed address."""

    def __init__(self, cache: Cache, count: int) -> None:
        layers = [layer for layer in cache.layers if isinstance(layer, RecurrentCache)]
        # By kind, for one copy of all layers at a time may not mix types.
        self._states = [list(kind) for kind in zip(*(layer.tensors for layer in layers), strict=True)]
        self._saved = [[state.new_empty(count, *state.shape[1:]) for state in kind] for kind in self._states]
        self._free = list(range(count))
        self._places: OrderedDict[int, int] = OrderedDict()  # by page, what makes room first in front

    def __contains__(self, page: int) -> bool:
        return page in self._places

    def save(self, page: int, slot: int, *, lasting: bool) -> None:
        """Keep a slot's state; one that is not `lasting` is the first to make room."""
        if page not in self._places:
            if not self._free and self._places:
                self.drop(next(iter(self._places)))
            if not self._free:
                return
            self._places[page] = self._free.pop()
            self._copy(self._saved, self._places[page], self._states, slot)
        self._places.move_to_end(page, last=lasting)

    def load(self, page: int, slot: int) -> None:
        """Let a slot have a state."""
        self._copy(self._states, slot, self._saved, self._places[page])
        self._places.move_to_end(page)

    def drop(self, page: int) -> None:
        """Keep a state no longer, if there is one."""
        if page in self._places:
            self._free.append(self._places.pop(page))

    @staticmethod
    def _copy(targets: Sequence[Sequence[Tensor]], to: int, sources: Sequence[Sequence[Tensor]], place: int) -> None:
        for theirs, ours in zip(targets, sources, strict=True):
            torch._foreach_copy_([state[to] for state in theirs], [state[place] for state in ours])
