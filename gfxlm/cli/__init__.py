"""The command `gfxlm`. Nothing here imports torch before a command has something to compute."""

import io
import sys


def main() -> None:
    """Run the command line and exit."""
    from gfxlm.cli.app import app

    # A terminal that lacks a character gets a question mark in its place, not a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    app(prog_name="gfxlm")
