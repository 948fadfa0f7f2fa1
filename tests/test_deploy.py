"""The systemd unit: that systemd takes it, that it is locked down, and that it fits the command it starts."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.runner import run

DEPLOY = Path(__file__).parent.parent / "deploy"
UNIT = DEPLOY / "gfxlm.service"
PROGRAM = "/opt/gfxlm/bin/gfxlm"
# 10 is an ordinary service; what the work needs (network, GPUs, compiled code) makes 1.6.
MOST_EXPOSED = 2.0

systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.fixture
def command() -> list[str]:
    (line,) = settings("ExecStart")
    return shlex.split(line)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is here."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(PROGRAM, sys.executable))
    return copy


@systemd
def test_systemd_takes_it_without_a_word(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@systemd
def test_verify_would_find_a_slip(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("ProtectClock=yes", "ProtectClocks=yes"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "ProtectClocks" in done.stderr


@systemd
def test_it_is_locked_down(unit: Path) -> None:
    analyze = ["systemd-analyze", "security", "--offline=true", "--no-pager", unit]
    done = subprocess.run(analyze, capture_output=True, text=True, check=False)
    level = re.search(r"Overall exposure level for gfxlm.service: ([\d.]+)", done.stdout)
    assert level is not None, done.stdout + done.stderr
    assert float(level[1]) <= MOST_EXPOSED


def test_its_options_are_the_commands(command: list[str]) -> None:
    assert command[:2] == [PROGRAM, "serve"]
    options = {word for word in command if word.startswith("--")}
    given = re.search(r"^GFXLM_OPTIONS=(.*)$", (DEPLOY / "gfxlm.env").read_text(), re.MULTILINE)
    assert given is not None
    options |= {word for word in given[1].split() if word.startswith("--")}
    documented = (DEPLOY / "README.md").read_text()
    options |= set(re.findall(r"`(--[a-z-]+)", documented))
    help_text = run("serve", "--help").stdout
    assert {option for option in options if f"{option} " not in help_text} == set()


def test_answers_under_way_may_end_before_systemd_kills(command: list[str]) -> None:
    (seconds,) = settings("TimeoutStopSec")
    assert int(seconds) >= int(command[command.index("--shutdown-timeout") + 1]) + 10


def test_it_names_the_files_that_the_readme_installs(command: list[str]) -> None:
    readme = (DEPLOY / "README.md").read_text()
    (credential,) = settings("LoadCredential")
    name, path = credential.split(":")
    assert path in readme
    assert command[command.index("--api-key-file") + 1] == f"%d/{name}"
    assert settings("EnvironmentFile") == ["/etc/gfxlm/gfxlm.env"]
    assert "${GFXLM_MODEL}" in command
    assert "$GFXLM_OPTIONS" in command
