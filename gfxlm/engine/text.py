"""The text of one request, as it becomes certain."""

from collections.abc import Sequence

from gfxlm.engine.stopping import StopStrings
from gfxlm.engine.tokenizer import Tokenizer


class TextStream:
    """Tokens in, text out: whole characters, nothing that may yet become a stop string, no end-of-text token.

    In the text of the first `min_tokens` tokens stop strings are text like any other.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], min_tokens: int = 0) -> None:
        self._unstoppable = min_tokens
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings(stop)
        self._silent = tokenizer.eos_token_ids

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stops.stopped_by

    def add(self, token: int, *, last: bool) -> tuple[str, bool]:
        """The text that this token settles, and whether a stop string ended it. The `last` one settles all."""
        segment = "" if token in self._silent else self._detokenizer.add(token)
        if last:
            segment += self._detokenizer.finish()
        if self._unstoppable:
            self._unstoppable -= 1
            return segment, False
        text, stopped = self._stops.feed(segment)
        return (text + self._stops.flush(), False) if last and not stopped else (text, stopped)
