"""Memory on the command line: what does not fit is said in one line before anything is loaded."""

import re
from pathlib import Path

import pytest

import gfxlm
from gfxlm.engine import budget as budgets
from gfxlm.engine import load as loading
from gfxlm.engine.prompt_cache import cache_prompt
from tests.checkpoints import mlx_checkpoint
from tests.cli.runner import complaint, run

ENDLESS = ("--logit-bias", '{"0": -1000}')


@pytest.fixture(scope="module")
def folder() -> Path:
    return mlx_checkpoint("qwen3")


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "read_weights", refuse)


def room_for(folder: Path, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for a model and so many positions, whatever this machine has."""
    plan = budgets.remaining(gfxlm.load(folder)[0])
    free = [plan.needed(positions), plan.needed(positions) - plan.weights]  # before it is loaded, and after

    def available(*_: object) -> int:
        return free.pop(0) if len(free) > 1 else free[0]

    monkeypatch.setattr(budgets, "available_bytes", available)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    "command", ["generate -p x", "chat", "cache-prompt -p x --prompt-cache-file /dev/null", "bench"]
)
def test_a_model_that_does_not_fit(command: str, folder: Path) -> None:
    name, *options = command.split()
    message = complaint(name, "--model", folder, *options, "--memory-limit", "1MB")
    assert message.startswith(f"{folder}: not enough memory: ")
    assert "of weights" in message
    assert message.endswith("not even a short context would fit; a smaller model would, or one of fewer bits")


@pytest.mark.usefixtures("nothing_is_read")
def test_no_such_amount(folder: Path) -> None:
    message = complaint("generate", "--model", folder, "-p", "x", "--memory-limit", "plenty")
    assert message == "memory limit 'plenty': expected an amount like 24GB, 24GiB or 80%"


@pytest.mark.parametrize("command", ["generate -p x", "chat"])
def test_a_context_that_does_not_fit(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(folder, 500, monkeypatch)
    monkeypatch.setattr(loading, "read_weights", None)
    name, *options = command.split()
    message = complaint(name, "--model", folder, *options, "--max-context", "1000")
    assert "keys and values for 1000 tokens" in message
    fitting = re.search(r"fit: a context of (\d+) tokens, (\d+) tokens with 8-bit keys and values \(kv_bits\)", message)
    assert fitting is not None
    plain, quantised = map(int, fitting.groups())
    assert 490 <= plain <= 500
    # A group of 64 in 8 bits takes 64 bytes and 4 for its scale and bias, instead of 128.
    assert quantised == pytest.approx(plain * 128 / 68, rel=0.01)


def test_a_context_that_fits_quantised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(folder, 500, monkeypatch)
    quantised = ("--kv-bits", "8", "--quantized-kv-start", "0", "--max-context", "900")
    result = run("generate", "--model", folder, "-p", "x", "-m", "3", "--quiet", *quantised)
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_context_is_shortened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(folder, 400, monkeypatch)
    with pytest.warns(UserWarning, match="the context is shortened to 400 tokens instead of 1024"):
        result = run("generate", "--model", folder, "-p", "x", "-m", "-1", "--quiet")
    assert result.exit_code == 0


def test_a_conversation_is_shortened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(folder, 400, monkeypatch)
    with pytest.warns(UserWarning, match="the context is shortened to 400 tokens instead of 1024"):
        result = run("chat", "--model", folder, "-m", "500", *ENDLESS, text="hello\n")
    assert result.exit_code == 0
    assert "(the context of 400 tokens is full" in result.stderr


def test_a_short_context_is_a_limit(folder: Path) -> None:
    raw = ("--ignore-chat-template", *ENDLESS)
    result = run("generate", "--model", folder, "-p", "x", *raw, "--max-context", "9")
    assert result.exit_code == 0
    assert "Generation: 9 tokens" in result.stderr
    assert complaint("generate", "--model", folder, "-p", "x" * 50, "--max-context", "9").endswith(
        "the context holds 9"
    )
    assert complaint("generate", "--model", folder, "-p", "x", "--max-context", "9999") == (
        "max_context must be from 1 to the model's 1024, but is 9999"
    )


def test_a_prompt_file_is_resumed_in_what_there_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = gfxlm.load(folder)
    file = tmp_path / "prompt.safetensors"
    cache_prompt(model, tokenizer, "def add_1(x):", file, model_name=str(folder))
    room_for(folder, 400, monkeypatch)
    with pytest.warns(UserWarning, match="the context is shortened to 400 tokens"):
        result = run("generate", "--prompt-cache-file", file, "-p", "y", "-m", "-1", "--quiet")
    assert result.exit_code == 0
