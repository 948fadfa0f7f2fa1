"""Text that comes into a command, and notes that go out of it beside the answer."""

import sys
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
