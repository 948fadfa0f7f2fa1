"""`--draft-model` and `--prompt-lookup-num-tokens`: the same text, and what is said of the drafts."""

from pathlib import Path

import pytest

from tests.checkpoints import mlx_checkpoint
from tests.cli.runner import complaint, run

PROMPT = "def add_1(x):\n    return x + 1\ndef add_1(x):\n    return"
FP32 = ("--dtype", "float32")


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def folder(request: pytest.FixtureRequest) -> Path:
    return mlx_checkpoint(request.param)


def test_generate(folder: Path) -> None:
    options = ("generate", "--model", folder, "-p", PROMPT, "-m", "16", *FP32)
    plain = run(*options)
    assert "Drafted" not in plain.stderr
    itself = run(*options, "--draft-model", folder, "--num-draft-tokens", "4")
    assert itself.stdout == plain.stdout
    assert "Drafted: 12 of 16 tokens" in itself.stderr
    for drafts in (("--draft-model", mlx_checkpoint("llama")), ("--prompt-lookup-num-tokens", "5")):
        assert run(*options, *drafts).stdout == plain.stdout


def test_chat(folder: Path) -> None:
    options = ("chat", "--model", folder, "-m", "12", *FP32)
    talk = "def add_1(x):\nreturn x\n"
    plain = run(*options, text=talk).stdout
    assert run(*options, "--draft-model", folder, text=talk).stdout == plain
    assert run(*options, "--prompt-lookup-num-tokens", "5", text=talk).stdout == plain


@pytest.mark.parametrize("command", [("generate", "-p", "x"), ("chat",)])
def test_bad_input(command: tuple[str, ...]) -> None:
    folder = mlx_checkpoint("qwen3")
    for options, said in (
        (("--num-draft-tokens", "0"), "num_draft_tokens must be from 1 to 64, but is 0"),
        (("--prompt-lookup-num-tokens", "65"), "prompt_lookup_num_tokens must be from 0 to 64, but is 65"),
        (("--draft-model", folder, "--prompt-lookup-num-tokens", "5"), "not from both"),
        (("--model", folder, "--draft-model", "builtin"), "builtin has another tokenizer than"),
    ):
        assert said in complaint(*command, *options)
