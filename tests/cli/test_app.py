"""What the shell sees: exit codes, streams, signals, and how long `--help` takes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gfxlm
from gfxlm.cli import generate as generate_command
from gfxlm.errors import UserError
from tests.checkpoints import mlx_checkpoint
from tests.cli.runner import complaint, run, start


@pytest.fixture(scope="module")
def model() -> Path:
    return mlx_checkpoint("qwen3")


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['gfxlm', '--help']\n"
        "from gfxlm.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        start_time = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start_time)
    assert done.stderr == "[]\n"
    for command in ("generate", "chat", "cache-prompt", "perplexity", "bench", "info", "convert"):
        assert f" {command} " in done.stdout
    assert min(seconds) < 1


def test_every_command_explains_itself() -> None:
    for command in ("generate", "chat", "cache-prompt", "perplexity", "bench", "info", "convert"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "--model" in result.stdout or command == "info"


def test_version() -> None:
    assert run("--version").stdout == f"gfxlm {gfxlm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--no-such-option"], "--no-such-option"),
        (["generate"], "--prompt"),
        (["no-such-command"], "no-such-command"),
        (["--no-such-option"], "--no-such-option"),
        (["convert", "--model", "x", "-q", "--mode", "gguf"], "'gguf' is not one of 'affine'"),
        (["convert", "--model", "x", "-q", "--bits", "four"], "--bits"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], said: str) -> None:
    assert said in complaint(*arguments)


def test_no_arguments_print_the_help() -> None:
    assert "Usage: " in run().output


def test_prompt_from_stdin_text_to_stdout_the_rest_to_stderr(model: Path) -> None:
    process = start("generate", "--model", model, "-p", "-", "-m", "8", "--ignore-chat-template")
    out, err = process.communicate(b"def add_1(x):\n")
    assert process.returncode == 0
    expected = gfxlm.generate(*gfxlm.load(model), "def add_1(x):\n", max_tokens=8)
    assert out.decode() == expected + "\n"
    lines = err.decode().splitlines()
    assert [line.split(":")[0] for line in lines] == ["Prompt", "Generation", "Peak memory"]


@pytest.fixture
def endless(model: Path, tmp_path: Path) -> Path:
    """The model with room for an answer that outlasts any test."""
    folder = shutil.copytree(model, tmp_path / "endless")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 17}))
    return folder


def test_closed_pipe_is_quiet(endless: Path) -> None:
    process = start("generate", "--model", endless, "-p", "def", "-m", "-1")
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate()
    assert (process.returncode, err) == (128 + signal.SIGPIPE, b"")


def test_ctrl_c_is_quiet(endless: Path) -> None:
    process = start("generate", "--model", endless, "-p", "def", "-m", "-1")
    assert process.stdout is not None
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (128 + signal.SIGINT, b"")


def test_error_in_a_shell() -> None:
    process = start("info", "/no/such/folder")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert err == b"gfxlm: error: /no/such/folder: no such folder (and a hub name reads owner/model)\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("two\nlines"), 2, "two lines"),
        (PermissionError(13, "Permission denied", "x"), 2, "x: Permission denied"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError(), 1, "out of memory; a shorter context or a smaller batch needs less"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            1,
            "out of memory; a shorter context or a smaller batch needs less",
        ),
    ],
)
def test_errors_become_one_line(error: Exception, code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> str:
        raise error

    monkeypatch.setattr(generate_command, "unescaped", fail)
    assert complaint("generate", "-p", "x", code=code) == message


def test_cpu_allocation_failure_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(_: object) -> str:
        torch.empty_strided((1 << 60,), (1,))
        return ""

    monkeypatch.setattr(generate_command, "unescaped", allocate)
    assert "out of memory" in complaint("generate", "-p", "x", code=1)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> str:
        raise RuntimeError("a bug")

    monkeypatch.setattr(generate_command, "unescaped", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("generate", "-p", "x")


def test_chat_outlives_ctrl_c(endless: Path) -> None:
    process = start("chat", "--model", endless, "-m", "-1")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(b"/nonsense\n/exit\n")
    assert process.returncode == 0
    assert err == b"(stopped)\n/nonsense is no command; /help lists them.\n"
