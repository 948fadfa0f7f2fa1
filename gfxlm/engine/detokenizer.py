"""Text from tokens, one token at a time."""

from typing import Protocol

_REPLACEMENT = "\ufffd"
# An unfinished UTF-8 character is at most three bytes, so at most three tokens and three U+FFFD.
_MAX_UNFINISHED = 3
_WINDOW = 16


class Decoder(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, token_ids: list[int], /) -> str:
        """The text of the tokens, with U+FFFD for bytes that are not UTF-8."""


class StreamingDetokenizer:
    """Turns tokens into text segments that never split a character; joined, they are `decode` of all tokens.

    Each step decodes a short window of tokens. It begins with tokens whose text is out already, because
    tokenizers treat the first token of a text differently (SentencePiece drops its leading space).

    One difference is left: SentencePiece tokenizers decode a run of byte tokens to nothing but U+FFFD if any
    byte of it is wrong, and the good characters before that byte are out by then.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._decode = tokenizer.decode
        self._window: list[int] = []
        self._text = ""  # of the window
        self._emitted = 0  # characters of _text that are out
        self._whole = 0  # tokens of the window up to where a text last ended in a finished character
        self._cut = 0  # tokens to drop when the window is next shortened; a finished character ends there

    def add(self, token: int) -> str:
        """Take one token; return the text that it settles, which may be empty."""
        self._window.append(token)
        self._text = self._decode(self._window)
        segment = self._emit(self._settled())
        self._shorten()
        return segment

    def finish(self) -> str:
        """The text still held back, once no more tokens can come."""
        return self._emit(len(self._text))

    def _emit(self, end: int) -> str:
        segment = self._text[self._emitted : end]
        self._emitted = end
        return segment

    def _settled(self) -> int:
        """How many characters of the text no later token can change."""
        if not self._text.endswith(_REPLACEMENT):
            self._whole = len(self._window)
            return len(self._text)
        if len(self._window) - self._whole <= _MAX_UNFINISHED:
            return self._emitted
        # Too many tokens for one character: there are invalid bytes, and only the last may yet be completed.
        valid = len(self._text.rstrip(_REPLACEMENT))
        return max(valid, len(self._text) - _MAX_UNFINISHED)

    def _shorten(self) -> None:
        size, held = len(self._window), len(self._text) - self._emitted
        if self._whole == size:
            if size - self._cut < _WINDOW:
                return
            kept = self._window[self._cut :]
            # Without text of its own a window gives no context: then its older part stays.
            if not self._decode(kept):
                kept = self._window[: self._cut] or self._window
            self._whole = self._cut = len(kept)
        elif size - self._whole >= 4 * _WINDOW:
            # Nothing but invalid bytes: cutting between them may change the front of the text, never its end.
            kept = self._window[-_WINDOW:]
            self._whole = self._cut = 0
        else:
            return
        self._window, self._text = kept, self._decode(kept)
        self._emitted = len(self._text) - held
