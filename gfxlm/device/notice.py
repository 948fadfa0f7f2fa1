"""What a person waits for, said where it is not part of any answer."""

import sys


def notice(text: str) -> None:
    """Say on stderr what takes long and is done once, before it is done."""
    clean = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress bar may stand in this line
    print(f"{clean}gfxlm: {text}", file=sys.stderr, flush=True)
