"""The book of pages where slots share them: a page is free, waits, or is held by as many as the book says."""

from collections import Counter

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gfxlm.nn.pages import Pages

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, SIZE, COUNT, LONGEST = 3, 4, 11, 6
SLOT = st.integers(0, SLOTS - 1)


class Book(RuleBasedStateMachine):
    """What the pool should be, in the plainest terms."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(SLOTS, LONGEST * SIZE, SIZE, COUNT, DEVICE)
        self.pages.dropped = self.dropped
        self.held: list[list[int]] = [[] for _ in range(SLOTS)]
        self.promised = [0] * SLOTS
        self.kept: set[int] = set()
        self.waiting: list[int] = []  # kept ones that nobody holds, the next to go in front
        self.told: list[int] = []

    def dropped(self, page: int) -> None:
        self.told.append(page)

    def gone(self) -> None:
        """Pages that were dropped for room: the ones that had waited longest."""
        assert self.told == self.waiting[: len(self.told)]
        self.kept -= set(self.told)
        del self.waiting[: len(self.told)]
        self.told.clear()

    @property
    def room(self) -> int:
        taken = {page for held in self.held for page in held}
        owed = sum(promised - len(held) for promised, held in zip(self.promised, self.held, strict=True))
        return COUNT - 1 - len(taken) - owed

    @rule(slot=SLOT, more=st.integers(0, LONGEST), wanted=st.integers(0, (LONGEST + 1) * SIZE))
    def promise(self, slot: int, more: int, wanted: int) -> None:
        """A slot begins, behind pages that are kept."""
        if self.held[slot]:
            return
        shared = sorted(self.kept)[: min(more, wanted // SIZE)]
        pages = -(-wanted // SIZE)
        used = [page for page in shared if page in self.waiting]
        possible = pages <= LONGEST and max(pages, self.promised[slot]) - self.promised[slot] <= self.room + len(
            shared
        ) - len(used)
        assert self.pages.promise(slot, wanted, shared) == possible
        if possible:
            self.promised[slot] = max(pages, self.promised[slot])
            self.held[slot] = shared
            self.waiting = [page for page in self.waiting if page not in used]

    @rule(slot=SLOT, wanted=st.integers(0, (LONGEST + 1) * SIZE))
    def reserve(self, slot: int, wanted: int) -> None:
        pages, before = -(-wanted // SIZE), len(self.held[slot])
        possible = pages <= before or (pages <= LONGEST and pages - self.promised[slot] <= self.room)
        assert self.pages.reserve(slot, wanted) == possible
        if possible and pages > before:
            now = list(self.pages.held(slot))
            assert now[:before] == self.held[slot]
            assert len(now) == pages
            self.gone()
            self.held[slot] = now
            self.promised[slot] = max(self.promised[slot], pages)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted({page for held in self.held for page in held})))
        self.pages.keep(page)
        self.kept.add(page)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.kept)))
        self.pages.forget(page)
        assert self.told == [page]
        self.told.clear()
        self.kept.remove(page)
        self.waiting = [other for other in self.waiting if other != page]

    @rule(slot=SLOT)
    def release(self, slot: int) -> None:
        self.pages.release(slot)
        left, self.held[slot], self.promised[slot] = self.held[slot], [], 0
        others = {page for held in self.held for page in held}
        self.waiting += [page for page in reversed(left) if page in self.kept and page not in others]

    @invariant()
    def books_agree(self) -> None:
        assert not self.told
        assert self.pages.free == self.room
        assert [list(self.pages.held(slot)) for slot in range(SLOTS)] == self.held
        holders = Counter(page for held in self.held for page in held)
        assert self.pages._holders == [holders[page] for page in range(COUNT)]
        assert list(self.pages._idle) == self.waiting
        free = set(range(1, COUNT)) - set(holders) - set(self.waiting)
        assert self.pages._free == free

    @invariant()
    def nobody_writes_what_another_has(self) -> None:
        """A page that two slots have is kept, or was: it is full, and behind it each has its own."""
        for slot, held in enumerate(self.held):
            assert len(set(held)) == len(held)
            if held:
                row = self.pages.table[slot].tolist()
                assert row == held + [0] * (LONGEST - len(held))


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_promise_holds_when_all_others_have_taken_what_they_can() -> None:
    pages = Pages(SLOTS, LONGEST * SIZE, SIZE, COUNT, DEVICE)
    assert pages.promise(0, 4 * SIZE)
    assert pages.promise(1, 4 * SIZE)
    assert not pages.promise(2, 3 * SIZE)
    assert not pages.reserve(2, 3 * SIZE)
    assert pages.reserve(2, 2 * SIZE)
    assert pages.free == 0
    assert pages.reserve(0, 4 * SIZE)
    assert pages.reserve(1, 4 * SIZE)


def test_who_waited_longest_goes_first_and_the_end_of_a_text_before_its_beginning() -> None:
    pages = Pages(SLOTS, LONGEST * SIZE, SIZE, COUNT, DEVICE)
    dropped = list[int]()
    pages.dropped = dropped.append
    texts = []
    for slot in (0, 1):
        pages.reserve(slot, 4 * SIZE)
        texts.append(list(pages.held(slot)))
        for page in texts[slot]:
            pages.keep(page)
        pages.release(slot)
    assert pages.promise(2, 6 * SIZE, texts[0][:2])
    assert pages.reserve(2, 6 * SIZE)
    assert dropped == [texts[0][3], texts[0][2]]
    assert pages.reserve(0, 4 * SIZE)
    assert dropped[2:] == texts[1][::-1]
