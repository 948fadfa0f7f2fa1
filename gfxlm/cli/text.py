"""Text that comes into a command, and notes that go out of it beside the answer."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gfxlm.errors import UserError


def read_text(path: str) -> str:
    """A text file, or stdin for "-". Raises UserError where it cannot be read or is not UTF-8."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        name = "stdin" if path == "-" else path
        raise UserError(f"{name}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})") from error


def note(text: str = "") -> None:
    """Tell the person at the keyboard something that is not part of the answer."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def ended_line() -> Iterator[Callable[[str], None]]:
    """What it yields writes pieces of an answer to stdout at once; a newline ends them, whatever else happens."""
    started = False

    def write(piece: str) -> None:
        nonlocal started
        started = True
        print(piece, end="", flush=True)

    try:
        yield write
    finally:
        if started:
            print(flush=True)


def counted(number: int) -> str:
    """A number of parameters."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
