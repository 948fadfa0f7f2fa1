"""Parsers over text that arrives in pieces, written as if all of it were there."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Event = TypeVar("Event")

Wait = Generator[None, None, T]  # runs until enough text has come, and returns T


class Malformed(Exception):  # noqa: N818  # caught by the parser that raises it; what it read then is plain text
    """The text is not what the parser expected."""


@dataclass(slots=True)
class Source:
    """The text that no event has carried yet. Its generators yield None wherever more text has to come."""

    text: str = ""
    position: int = 0  # before which the parser has read
    ended: bool = False

    @property
    def rest(self) -> str:
        """What is there and not read."""
        return self.text[self.position :]

    def more(self) -> Wait[None]:
        """Wait for another piece. Raises Malformed where none can come."""
        if self.ended:
            raise Malformed
        yield None

    def commit(self) -> str:
        """Forget what has been read, and return it."""
        read, self.text, self.position = self.text[: self.position], self.rest, 0
        return read

    def rewind(self) -> None:
        """Back to what was last committed."""
        self.position = 0

    def skip_space(self, also: str = "") -> Wait[str]:
        """Read white space, and characters of `also`; the character that follows, not read, or "" at the end."""
        while True:
            while self.position < len(self.text):
                character = self.text[self.position]
                if not (character.isspace() or character in also):
                    return character
                self.position += 1
            if self.ended:
                return ""
            yield None

    def starts_with(self, *tags: str) -> Wait[str]:
        """Which of the tags comes next; it is not read. "" where it is none of them."""
        while True:
            rest = self.rest
            for tag in tags:
                if rest.startswith(tag):
                    return tag
            if self.ended or not any(tag.startswith(rest) for tag in tags):
                return ""
            yield None

    def expect(self, tag: str) -> Wait[None]:
        """Read the tag. Raises Malformed where something else comes."""
        if not (yield from self.starts_with(tag)):
            raise Malformed
        self.position += len(tag)

    def until(self, *tags: str) -> Wait[tuple[str, str]]:
        """Read up to the first of the tags; the text before it, and the tag, which is not read.

        Raises Malformed where none of them comes.
        """
        begin = searched = self.position
        while (found := first_of(self.text, tags, searched)) is None:
            searched = max(begin, len(self.text) - max(map(len, tags)) + 1)
            yield from self.more()
        self.position, tag = found
        return self.text[begin : self.position], tag

    def nested(self, quotes: str) -> Wait[str]:
        """Read from a bracket to the one that closes it. Raises Malformed where none does."""
        begin = seen = self.position
        nesting = Nesting(quotes)
        while not (end := nesting.end(self.text[seen:])):
            seen = len(self.text)
            yield from self.more()
        self.position = seen + end
        return self.text[begin : self.position]

    def flow(self, *tags: str) -> Generator[str | None, None, str]:
        """Commit text up to the first of the tags and yield it as it comes; the tag, or "" where the text ends.

        The white space before the tag, or before the end, stays unread.
        """
        while True:
            rest = self.rest
            found = first_of(rest, tags)
            settled = (rest[: found[0]] if found else rest[: len(rest) - unsettled(rest, tags)]).rstrip()
            if self.ended and not found:
                settled = rest.rstrip()
            if settled:
                self.position += len(settled)
                yield self.commit()
            if found:
                return found[1]
            if self.ended:
                return ""
            yield None


class Nesting:
    """Follows brackets, and strings in any of the `quotes`, through text in pieces that begins with a bracket."""

    def __init__(self, quotes: str = '"') -> None:
        self._quotes = quotes
        self._depth = 0
        self._quote = ""  # of the string that is open
        self._escaped = False

    def end(self, text: str) -> int:
        """Go on by a piece; the place in it behind which the first bracket is closed, 0 if it is not."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quote:
                self._escaped = character == "\\"
                self._quote = "" if character == self._quote else self._quote
            elif character in self._quotes:
                self._quote = character
            elif character in "([{":
                self._depth += 1
            elif character in ")]}":
                self._depth -= 1
            if self._depth == 0:
                return i + 1
        return 0


def first_of(text: str, tags: Sequence[str], begin: int = 0) -> tuple[int, str] | None:
    """Where the first of the tags from `begin` on is, and which one it is."""
    return min(((start, tag) for tag in tags if (start := text.find(tag, begin)) >= 0), default=None)


def unsettled(text: str, tags: Sequence[str]) -> int:
    """The length of the longest end of `text` with which a tag begins."""
    longest = max(map(len, tags), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0


class Incremental(Generic[Event]):
    """Feeds a parser: a generator of events over a `Source`, which yields None for want of text."""

    def __init__(self, parse: Callable[[Source], Iterator[Event | None]]) -> None:
        self._source = Source()
        self._parser = parse(self._source)

    def feed(self, text: str) -> list[Event]:
        """Take the next piece; the events that it settles."""
        self._source.text += text
        return self._events()

    def finish(self) -> list[Event]:
        """The events that are left once no more text can come."""
        self._source.ended = True
        return self._events()

    def _events(self) -> list[Event]:
        events = []
        for event in self._parser:
            if event is None:
                break
            events.append(event)
        return events
