"""Thinking told from the answer, however the text is cut."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfxlm.engine.tokenizer import THINK_TAGS
from gfxlm.server.incremental import Incremental
from gfxlm.server.reasoning import Reasoning, Thinking, split, think_tags
from gfxlm.server.tools.tool import Content

OUTSIDE = Thinking("<think>", "</think>", 1)
INSIDE = Thinking("<think>", "</think>", 1, inside=True, expected=True)


@pytest.mark.parametrize("tags", [*THINK_TAGS, ("<|channel>", "<channel|>")])
def test_tags_are_those_of_the_tokenizer(tags: tuple[str, str]) -> None:
    assert think_tags({*tags, "a"}) == tags
    assert think_tags({tags[0]}) is None


def read(pieces: Sequence[str], thinking: Thinking | None) -> tuple[str, str]:
    parser = Incremental[Reasoning | Content](lambda source: split(source, thinking))
    found = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert all(event.text for event in found)
    kinds = [type(event) for event in found]
    assert kinds == sorted(kinds, key=[Reasoning, Content].index)
    return tuple("".join(event.text for event in found if isinstance(event, kind)) for kind in (Reasoning, Content))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("", OUTSIDE, "", ""),
        (" \n", OUTSIDE, "", " \n"),
        ("plain", OUTSIDE, "", "plain"),
        (" <thin", OUTSIDE, "", " <thin"),
        ("<think>\n a b \n</think>\n\n c \n", OUTSIDE, "a b", "c \n"),
        ("\n<think></think>c", OUTSIDE, "", "c"),
        ("a <think>b</think>", OUTSIDE, "", "a <think>b</think>"),
        ("</think>b", OUTSIDE, "", "</think>b"),
        ("<think>a</think>b</think><think>", OUTSIDE, "a", "b</think><think>"),
        ("<think>never ends </thin", OUTSIDE, "never ends </thin", ""),
        ("a</think>b", INSIDE, "a", "b"),
        ("<think>a</think>b", INSIDE, "a", "b"),
        ("a\n", INSIDE, "a", ""),
        ("<think>a</think>b", None, "", "<think>a</think>b"),
    ],
)
def test_thinking(text: str, thinking: Thinking | None, reasoning: str, content: str) -> None:
    assert read([text], thinking) == (reasoning, content)
    assert read(list(text), thinking) == (reasoning, content)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<thi", "nk>", " ", "\n", "a", "é", "<", ">"]), max_size=12),
    st.sampled_from([OUTSIDE, INSIDE, None]),
)
def test_any_cut_gives_the_same(pieces: list[str], thinking: Thinking | None) -> None:
    assert read(pieces, thinking) == read(["".join(pieces)], thinking)


def test_thinking_comes_as_it_is_written() -> None:
    parser = Incremental[Reasoning | Content](lambda source: split(source, OUTSIDE))
    assert parser.feed("<think>\nwell, ") == [Reasoning("well,")]
    assert parser.feed("<") == []
    assert parser.feed("b") == [Reasoning(" <b")]
