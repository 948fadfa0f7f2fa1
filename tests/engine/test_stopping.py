from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gfxlm.engine.stopping import StopStrings

TEXT = st.text(alphabet="ab😀", max_size=30)
STOPS = st.lists(st.text(alphabet="ab😀", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read the text letter by letter until it ends with a stop string; take the longest such string off."""
    for end in range(len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


def stream(stopper: StopStrings, segments: list[str]) -> tuple[str, bool]:
    """All that is emitted; nothing more is fed once a stop string was met."""
    emitted = ""
    for segment in segments:
        text, stopped = stopper.feed(segment)
        emitted += text
        if stopped:
            return emitted, True
    return emitted + stopper.flush(), False


@given(TEXT, STOPS, st.lists(st.integers(0, 30)))
@example("aab", ["ab"], [1, 2])
@example("abab", ["bb", "abb"], [1, 2, 3])
@example("aaaab", ["aaab", "b"], [2])
@example("aaba", ["aaba", "ab"], [])
@example("ababb", ["abb"], [1, 2, 3, 4])
def test_any_segments_give_what_the_whole_text_gives(text, stops, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    segments = [text[start:end] for start, end in pairwise(borders)]
    assert stream(StopStrings(stops), segments) == naive(text, stops)


@given(TEXT, STOPS)
def test_only_a_possible_start_is_held_back(text, stops):
    stopper = StopStrings(stops)
    emitted = ""
    for i, letter in enumerate(text):
        segment, stopped = stopper.feed(letter)
        emitted += segment
        if stopped:
            return
        held = text[len(emitted) : i + 1]
        assert not held or any(stop.startswith(held) for stop in stops)
    assert stopper.flush() == text[len(emitted) :]


def test_after_the_stop_nothing_comes():
    stopper = StopStrings(["END"])
    assert stopper.feed("all E") == ("all ", False)
    assert stopper.feed("ND of it") == ("", True)
    assert stopper.feed("more") == ("", True)
    assert stopper.flush() == ""


@pytest.mark.parametrize("stops", [[], ()])
def test_without_stop_strings_all_passes(stops):
    stopper = StopStrings(stops)
    assert stopper.feed("anything") == ("anything", False)
    assert stopper.flush() == ""
