"""Files in which gfxlm keeps what it has found out about a machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for them, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gfxlm"


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, whoever else reads or writes it. Raises OSError where that is impossible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
