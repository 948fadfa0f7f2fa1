"""`--max-kv-size`: the text of `max_kv_size`, in generate, chat and files."""

from pathlib import Path

import pytest
import torch

import gfxlm
from gfxlm.models.cache import prompt_cache_size
from tests.checkpoints import mlx_checkpoint
from tests.cli.runner import complaint, run

DOCUMENT, QUESTION = "def add_1(x): # one, two, three " * 3, " plus two"
FP32 = ("--dtype", "float32")
SIZE = ("--max-kv-size", "16")


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def folder(request: pytest.FixtureRequest) -> Path:
    return mlx_checkpoint(request.param)


def test_generate(folder: Path) -> None:
    model, tokenizer = gfxlm.load(folder, dtype=torch.float32)
    expected = gfxlm.generate(model, tokenizer, DOCUMENT, max_tokens=30, max_kv_size=16)
    options = ("generate", "--model", folder, "--ignore-chat-template", "-p", DOCUMENT, "-m", "30", *FP32)
    assert run(*options, *SIZE).stdout == expected + "\n"
    assert run(*options).stdout != expected + "\n" or model.config.model_type == "qwen3_next"


def test_files_and_chat(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "document.safetensors"
    run("cache-prompt", "--model", folder, "-p", DOCUMENT, "--prompt-cache-file", file, *FP32, *SIZE)
    assert prompt_cache_size(file) == 16
    text = DOCUMENT + QUESTION
    whole = run("generate", "--model", folder, "-p", text, "-m", "12", *FP32, *SIZE).stdout
    for options in ((), SIZE):
        result = run("generate", "--prompt-cache-file", file, "-p", QUESTION, "-m", "12", "--quiet", *FP32, *options)
        assert (result.exit_code, result.stderr, result.stdout) == (0, "", whole)
    talk = f"{text}\nagain\n"
    talked = run("chat", "--model", folder, "-m", "12", *FP32, *SIZE, text=talk).stdout
    assert talked.startswith(whole)
    for options in ((), SIZE):
        resumed = run("chat", "--prompt-cache-file", file, "-m", "12", *FP32, *options, text=f"{QUESTION}\nagain\n")
        assert resumed.stdout == talked
    said = complaint("generate", "--prompt-cache-file", file, "-p", QUESTION, *FP32, "--max-kv-size", "17")
    assert said.startswith(f"{file}: a cache of 16 positions (max_kv_size) has forgotten some of the ")


@pytest.mark.parametrize("command", ["generate", "chat", "cache-prompt"])
def test_bad_sizes_before_any_loading(command: str) -> None:
    needed = {"generate": ["-p", "x"], "chat": [], "cache-prompt": ["-p", "x", "--prompt-cache-file", "file"]}
    said = complaint(command, "--model", "/no/such", *needed[command], "--max-kv-size", "4")
    assert said == "max_kv_size must be at least 5, as 4 positions are always kept, but is 4"


@pytest.mark.parametrize("command", [("generate", "-p", "x"), ("chat",)])
@pytest.mark.parametrize("drafts", [("--draft-model", "/no/such"), ("--prompt-lookup-num-tokens", "4")])
def test_drafts_do_not_go_with_it(command: tuple[str, ...], drafts: tuple[str, str]) -> None:
    said = complaint(*command, "--model", "/no/such", *SIZE, *drafts)
    assert said.startswith("--max-kv-size: a cache that forgets cannot take back drafts")
