"""What is said to a person who waits."""

import io
import sys

import pytest

from gfxlm.device.notice import notice


@pytest.mark.parametrize(("terminal", "said"), [(False, "gfxlm: a minute\n"), (True, "\r\x1b[Kgfxlm: a minute\n")])
def test_one_line_that_replaces_a_progress_bar(terminal: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr(err, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", err)
    notice("a minute")
    assert err.getvalue() == said
