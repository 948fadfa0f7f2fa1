"""The catalogue of shapes: well named, and fit to be recorded for any architecture."""

from collections import Counter

import pytest

from benchmarks.bars import BARS
from gfxlm.device.arch import named
from gfxlm.errors import UserError
from gfxlm.kernels.cases import catalogue, topics
from gfxlm.kernels.record import record


def test_names_are_unique() -> None:
    names = Counter(case.name for cases in catalogue().values() for case in cases)
    assert [name for name, times in names.items() if times > 1] == []


@pytest.mark.parametrize("topic", topics())
def test_a_topics_cases(topic: str) -> None:
    cases = catalogue([topic])[topic]
    assert any(case.headline for case in cases)
    assert [case.name for case in cases if not case.nbytes and not case.flops] == []


@pytest.mark.parametrize("arch", ["gfx942", "gfx1151", "gfx1201", "sm_90"])
@pytest.mark.parametrize("topic", topics())
def test_every_case_launches_something(topic: str, arch: str) -> None:
    assert [case.name for case in catalogue([topic])[topic] if not record(case, named(arch))] == []


def test_choosing() -> None:
    [topic, *_] = topics()
    first = catalogue()[topic][0]
    assert catalogue([topic]) == {topic: catalogue()[topic]}
    assert first in catalogue([first.name.split("/")[0]])[topic]
    assert catalogue([first.name]) == {topic: [first]}
    with pytest.raises(UserError, match="no case is called 'nonsense'; known are"):
        catalogue([topic, "nonsense"])


def test_bars_are_of_cases() -> None:
    assert set(BARS) <= {case.name for cases in catalogue().values() for case in cases}
