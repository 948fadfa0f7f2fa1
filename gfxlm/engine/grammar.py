"""Structured output: which tokens a request's grammar allows next, as bits that the sampler applies on the device.

llguidance does the parsing, on the host and for one request at a time. What it says is a bit for each token of the
vocabulary: int32 words, bit i of word j for token 32 j + i.
"""

import copy
import json
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

Kind = Literal["json_schema", "json_object", "regex", "lark", "choice"]
_COMPILED = 64  # grammars that are kept
# So many masks take a quarter of a millisecond in one thread; others may not be awake by then.
_FEW = 8
_LONGEST = 400  # characters of an error, which may repeat the grammar
# Between the parts of JSON: a line break and an indentation. Without a bound, a weak model may never end one.
_WHITESPACE = r"\r?\n?( {0,40}|\t{0,10})"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text has to look like, from its first token on or from the one behind the token `after`.

    `text` is by kind: a JSON schema (its "x-guidance" goes to llguidance), nothing for any JSON object, a regular
    expression for the whole text (Rust's syntax), a grammar in llguidance's Lark, or a JSON list of strings of which
    the text is one. What comes before and with the token `after`, which ends the thinking of models that think aloud,
    is free, but does not end the text.
    """

    kind: Kind
    text: str = ""
    after: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"a grammar is one of {', '.join(get_args(Kind))}, but is {self.kind!r}")

    @classmethod
    def choice(cls, strings: Sequence[str], after: int | None = None) -> "Grammar":
        """The text is one of these."""
        return cls("choice", json.dumps(list(strings)), after)


class Matcher(Protocol):
    """Where one request is in its grammar."""

    @property
    def error(self) -> str | None:
        """Why no text can follow, where none can. Known once there was a mask."""

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed."""


class GrammarSource(Protocol):
    """Who compiles grammars for an engine: `Grammars`."""

    def check(self, grammar: Grammar) -> None: ...

    def matcher(self, grammar: Grammar) -> Matcher: ...

    def masks(self, matchers: Sequence[Any]) -> Tensor: ...


class TokenMatcher:
    """llguidance's matcher, behind a part of the text that is `free` of it if there is one."""

    def __init__(self, inner: "LLMatcher", after: int | None) -> None:
        self.inner, self._after = inner, after
        self.free = after is not None
        self.error: str | None = None

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed."""
        if self.free:
            self.free = token != self._after
        else:
            self.inner.consume_token(token)


class Grammars:
    """Compiles grammars for one tokenizer and a model of so many tokens, and keeps the latest. Any thread may ask.

    The first one takes seconds more, with a large vocabulary. End-of-text tokens are those that the tokenizer knows
    by then.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled = lru_cache(_COMPILED)(self._compile)
        self._lock = threading.Lock()
        self._prepared: _Prepared | None = None

    def check(self, grammar: Grammar) -> None:
        """Raise UserError, with what the compiler says, for a grammar that does not compile."""
        self._compiled(replace(grammar, after=None))

    def matcher(self, grammar: Grammar) -> TokenMatcher:
        """The beginning of a text. Raises UserError for a grammar that does not compile."""
        return TokenMatcher(self._compiled(replace(grammar, after=None)).deep_copy(), grammar.after)

    def masks(self, matchers: Sequence[TokenMatcher]) -> Tensor:
        """The bits of the tokens that may follow, int32 (len(matchers), ceil(V / 32)), many found by several threads.

        None where a grammar cannot go on, which then has an `error`; end-of-text tokens where a text may end, or must.
        """
        rows = torch.zeros(len(matchers), _words(self._all_tokens), dtype=torch.int32)
        bound = [(matcher.inner, row) for row, matcher in enumerate(matchers) if not matcher.free]
        prepared = self._prepare()
        if len(bound) <= _FEW:
            for inner, row in bound:
                inner.unsafe_compute_mask_ptr(rows[row].data_ptr(), rows[row].nbytes)
        else:
            prepared.threads.unsafe_compute_mask_ptr(bound, rows.data_ptr(), rows[0].nbytes, len(rows))
        for row, matcher in zip(rows, matchers, strict=True):
            if matcher.free:
                row[: len(prepared.free)] = prepared.free
            elif matcher.inner.is_error():  # llguidance then lets the text end, unfinished
                reason = matcher.inner.get_error().removesuffix("<non-verbose/>")
                matcher.error = "nothing can follow" if reason.startswith("NoExtension") else _one_line(reason)
                row.zero_()
        return rows[:, : _words(self._vocab_size)]

    @property
    def _all_tokens(self) -> int:
        """A model may have fewer tokens than its tokenizer, or more."""
        return max(self._vocab_size, len(self._tokenizer))

    def _compile(self, grammar: Grammar) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        tokenizer = self._prepare().tokenizer
        # Verbose errors hold the text so far.
        limits = LLParserLimits(verbose_errors=False)
        try:
            matcher = LLMatcher(tokenizer, _SOURCES[grammar.kind](grammar.text), log_level=0, limits=limits)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{grammar.kind}: {_one_line(str(error))}") from error
        if matcher.is_error():
            raise UserError(f"{grammar.kind}: {_one_line(matcher.get_error())}")
        return matcher

    def _prepare(self) -> "_Prepared":
        with self._lock:
            if self._prepared is None:
                self._prepared = self._read_tokenizer()
            return self._prepared

    def _read_tokenizer(self) -> "_Prepared":
        from llguidance import LLExecutor

        ends = sorted(token for token in self._tokenizer.eos_token_ids if token < self._vocab_size)
        if not ends:
            raise UserError("structured output needs a token that ends a text, and this model's tokenizer names none")
        free = _bits(set(self._tokenizer.get_vocab().values()) - set(ends), self._vocab_size)
        return _Prepared(_llguidances(self._tokenizer, self._all_tokens, ends), free, LLExecutor())


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What all grammars of one tokenizer share."""

    tokenizer: "LLTokenizer"
    free: Tensor  # the bits of all tokens that do not end a text
    threads: "LLExecutor"


@runtime_checkable
class MaskedSampler(Protocol):
    """What holds the masks on the device: `gfxlm.engine.sampler.Sampler`."""

    def allow(self, slots: Sequence[int], masks: Tensor) -> None: ...


class _NoMaskError(Exception):
    """Whoever finds masks has raised something."""


class Constraints:
    """The grammars of the requests that run in an engine, by slot, and their masks in its sampler."""

    def __init__(self, source: GrammarSource | None, sampler: object) -> None:
        self._source = source
        self._sampler: MaskedSampler | None = sampler if isinstance(sampler, MaskedSampler) else None
        self._matchers: dict[int, Matcher] = {}
        self._changed: set[int] = set()  # slots whose masks are out of date
        self._failed: dict[int, str] = {}  # what was raised instead of a mask

    def check(self, grammar: Grammar | None) -> None:
        """Raise UserError for a grammar that cannot be used here."""
        if grammar is None:
            return
        if self._source is None:
            raise UserError("grammar: this engine was made without grammars=Grammars(tokenizer, vocab_size)")
        if self._sampler is None:
            raise UserError("grammar: does not go with a sampler or logits_processors of your own")
        self._source.check(grammar)

    def begin(self, slot: int, grammar: Grammar | None) -> None:
        """A request starts in a slot."""
        if grammar is not None and self._source is not None:
            self._matchers[slot] = self._source.matcher(grammar)
            self._changed.add(slot)

    def accept(self, slot: int, token: int) -> None:
        """It goes on by a token."""
        if slot in self._matchers:
            self._matchers[slot].accept(token)
            self._changed.add(slot)

    def end(self, slot: int) -> None:
        """It is over."""
        self._matchers.pop(slot, None)
        self._failed.pop(slot, None)
        self._changed.discard(slot)

    def any(self, slots: Collection[int]) -> bool:
        """Whether one of these requests has a grammar, which has to see a token before the next one is sampled."""
        return any(slot in self._matchers for slot in slots)

    def update(self) -> None:
        """Bring the masks of all slots up to date, before whatever is launched next. Waits for nothing.

        Where one cannot be found, its slot has an `error`, and keeps the mask that it had.
        """
        if not self._changed or self._source is None or self._sampler is None:
            return
        slots = sorted(self._changed)
        try:
            self._sampler.allow(slots, self._masks(self._source, slots))
        except _NoMaskError:
            for slot in slots:  # to see whose it was
                with suppress(_NoMaskError):
                    self._sampler.allow([slot], self._masks(self._source, [slot]))
        self._changed.clear()

    def _masks(self, source: GrammarSource, slots: Sequence[int]) -> Tensor:
        try:
            return source.masks([self._matchers[slot] for slot in slots])
        except Exception as error:
            if len(slots) == 1:
                self._failed[slots[0]] = f"{type(error).__name__}: {error}"
            raise _NoMaskError from error

    def error(self, slot: int) -> str | None:
        """Why a request's grammar cannot go on, None if it can."""
        matcher = self._matchers.get(slot)
        reason = self._failed.get(slot) or (matcher.error if matcher else None)
        return f"the grammar cannot go on: {reason}" if reason else None


def _llguidances(tokenizer: Tokenizer, size: int, ends: Sequence[int]) -> "LLTokenizer":
    """Its own tokenizer, from the Rust one that is inside."""
    from llguidance import LLTokenizer

    inside = getattr(tokenizer, "backend_tokenizer", None)
    if inside is None:
        raise UserError("structured output needs a tokenizer.json, and this model's tokenizer is of another kind")
    if inside.padding or inside.truncation:
        inside = copy.copy(inside)
        inside.no_padding()
        inside.no_truncation()
    try:
        return LLTokenizer(inside.to_str(), n_vocab=size, eos_token=list(ends))
    except ValueError as error:
        raise UserError(f"llguidance cannot read this model's tokenizer: {_one_line(str(error))}") from error


def _schema(text: str) -> str:
    from llguidance import LLMatcher

    json.loads(text)  # llguidance names places in a text of its own around it
    return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITESPACE})


def _object(text: str) -> str:
    if text:
        raise ValueError("takes no text; for a schema there is json_schema")
    return _schema('{"type": "object"}')


def _regex(text: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(text)


def _lark(text: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(text)


def _choice(text: str) -> str:
    strings = json.loads(text)
    if not isinstance(strings, list) or not strings or not all(isinstance(string, str) for string in strings):
        raise ValueError(f"takes a JSON list of strings that is not empty, but is {text}")
    return _lark("start: " + " | ".join(map(json.dumps, strings)))


_SOURCES: dict[Kind, Callable[[str], str]] = {
    "json_schema": _schema,
    "json_object": _object,
    "regex": _regex,
    "lark": _lark,
    "choice": _choice,
}


def _words(tokens: int) -> int:
    return -(-tokens // 32)


def _bits(tokens: Collection[int], vocab_size: int) -> Tensor:
    """Some tokens as bits, int32 (ceil(V / 32),); one beyond the vocabulary is left out."""
    flags = torch.zeros(_words(vocab_size) * 32, dtype=torch.int64)
    flags[[token for token in tokens if token < vocab_size]] = 1
    words = (flags.view(-1, 32) << torch.arange(32)).sum(dim=1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "…"
