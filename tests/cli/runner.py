"""The command line as the tests call it: in this process where logic is meant, in a shell where processes are."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from gfxlm.cli.app import app

# The libraries' threads would wait for each other on a busy machine.
_ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(*arguments: str | Path, text: str | bytes | None = None) -> Result:
    """Run in this process; an exception that no command should let out fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def complaint(*arguments: str | Path, code: int = 2, text: str | bytes | None = None) -> str:
    """The message of a run that has to fail with that code, one line on stderr and nothing on stdout."""
    result = run(*arguments, text=text)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("gfxlm: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("gfxlm: error: ").rstrip("\n")


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    """Start a process of its own, with all three streams piped, that an interrupt reaches wherever the tests run."""
    command = [sys.executable, "-m", "gfxlm", *map(str, arguments)]
    pipe = subprocess.PIPE
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=_ENVIRONMENT, preexec_fn=listen)
