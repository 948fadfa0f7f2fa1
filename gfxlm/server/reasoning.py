"""A model's thinking, told from its answer by the tags around it."""

from collections.abc import Container, Iterator
from dataclasses import dataclass

from gfxlm.engine.tokenizer import THINK_TAGS
from gfxlm.server.incremental import Source
from gfxlm.server.tools.tool import Content


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thought."""

    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    """How an answer thinks: the tags, the token that ends it, and whether the prompt has opened it already.

    `expected` says that thinking will come, not only that it may.
    """

    start: str
    end: str
    end_token: int
    inside: bool = False
    expected: bool = False


def think_tags(vocabulary: Container[str]) -> tuple[str, str] | None:
    """The tags that a vocabulary has as tokens."""
    return next(((start, end) for start, end in THINK_TAGS if start in vocabulary and end in vocabulary), None)


def split(source: Source, thinking: Thinking | None) -> Iterator[Reasoning | Content | None]:
    """The parser: thinking, if the answer begins with it, and the rest.

    White space at the ends of the thinking, and behind it, belongs to the tags.
    """
    if thinking is not None:
        yield from source.skip_space()
        tagged = yield from source.starts_with(thinking.start)
        source.position += len(tagged)
        if tagged or thinking.inside:
            yield from source.skip_space()
            source.commit()
            flow = source.flow(thinking.end)
            yield from (None if text is None else Reasoning(text) for text in flow)
            yield from source.skip_space()
            if (yield from source.starts_with(thinking.end)):
                source.position += len(thinking.end)
                yield from source.skip_space()
            source.commit()
        source.rewind()
    while True:
        if source.text:
            source.position = len(source.text)
            yield Content(source.commit())
        if source.ended:
            return
        yield None
