"""Stop strings, found in text that arrives in segments."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until the first stop string is complete, and holds back what may be the start of one.

    The result depends on the text alone, not on how it was cut: the text ends where the first stop string to
    be completed begins; of two that are completed at once, the longer counts.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.stopped_by: str | None = None  # the stop string that was met

    def feed(self, segment: str) -> tuple[str, bool]:
        """Take the next segment; return the text that is safe to emit, and whether a stop string was met."""
        if self.stopped_by is not None:
            return "", True
        text = self._held + segment
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.stopped_by = min(found)
            self._held = ""
            return text[:start], True
        emit = len(text) - self._unsettled(text)
        self._held = text[emit:]
        return text[:emit], False

    def flush(self) -> str:
        """The text still held back, once no more can come."""
        held, self._held = self._held, ""
        return held

    def _unsettled(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
