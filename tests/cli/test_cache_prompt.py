"""`gfxlm cache-prompt`, what `generate` and `chat` make of its file, and their options for quantised caches."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gfxlm
from gfxlm.models.cache import load_prompt_cache
from gfxlm.nn.cache import kv_format
from tests.checkpoints import mlx_checkpoint
from tests.cli.runner import complaint, run

DOCUMENT, QUESTION = "def add_1(x): # one", " plus two"
# Where a prompt is cut does not decide a text then.
FP32 = ("--dtype", "float32")


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def folder(request: pytest.FixtureRequest) -> Path:
    return mlx_checkpoint(request.param)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "document.safetensors"


def cached(folder: Path, file: Path, *options: str | Path) -> str:
    result = run("cache-prompt", "--model", folder, "-p", DOCUMENT, "--prompt-cache-file", file, *FP32, *options)
    assert (result.exit_code, result.stdout) == (0, "")
    return result.stderr


def answer(prompt: str, *options: str | Path) -> str:
    result = run("generate", "-p", prompt, "-m", "12", "--quiet", *FP32, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def test_generate_goes_on(folder: Path, file: Path) -> None:
    assert cached(folder, file).startswith(f"{file}: ")
    whole = answer(DOCUMENT + QUESTION, "--model", folder)
    # The file knows the model.
    assert answer(QUESTION, "--prompt-cache-file", file) == whole
    assert answer(QUESTION, "--prompt-cache-file", file, "--model", folder) == whole
    cached(folder, file, "--system-prompt", "Be brief.")
    whole = answer(DOCUMENT + QUESTION, "--model", folder, "--system-prompt", "Be brief.")
    assert answer(QUESTION, "--prompt-cache-file", file) == whole
    cached(folder, file, "--ignore-chat-template")
    raw = answer(DOCUMENT + QUESTION, "--model", folder, "--ignore-chat-template")
    assert answer(QUESTION, "--prompt-cache-file", file, "--ignore-chat-template") == raw


def test_what_cannot_be_used_is_said(folder: Path, file: Path) -> None:
    cached(folder, file)
    result = run(
        "generate", "-p", QUESTION, "-m", "12", "--quiet", "--prompt-cache-file", file, "--ignore-chat-template", *FP32
    )
    assert result.stdout == answer(DOCUMENT + QUESTION, "--model", folder, "--ignore-chat-template")
    assert result.stderr.startswith("(this prompt goes on from 0 of the ")


def test_chat_goes_on(folder: Path, file: Path) -> None:
    cached(folder, file)
    ours = run("chat", "--prompt-cache-file", file, "-m", "6", *FP32, text=f"{QUESTION}\nagain\n/reset\n{QUESTION}\n")
    fresh = run("chat", "--model", folder, "-m", "6", *FP32, text=f"{DOCUMENT}{QUESTION}\nagain\n")
    one = run("chat", "--model", folder, "-m", "6", *FP32, text=f"{DOCUMENT}{QUESTION}\n").stdout
    assert ours.stdout == fresh.stdout + one


def test_quantised(folder: Path, file: Path) -> None:
    options = ["--kv-bits", "4", "--kv-group-size", "32", "--quantized-kv-start", "0"]
    kv: dict[str, Any] = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
    model, tokenizer = gfxlm.load(folder, dtype=torch.float32)
    expected = gfxlm.generate(model, tokenizer, DOCUMENT, max_tokens=12, **kv) + "\n"
    raw = ("--model", folder, "--ignore-chat-template")
    assert answer(DOCUMENT, *raw, *options) == expected
    plain = answer(DOCUMENT, *raw)
    assert answer(DOCUMENT, *raw, *options[:4]) == plain  # the context is too short for mlx-lm's default
    assert plain != expected or model.config.model_type == "qwen3_next"
    cached(folder, file, *options)
    assert str(kv_format(load_prompt_cache(file).layers[-1])) == "4 bits in groups of 32"
    whole = answer(DOCUMENT + QUESTION, "--model", folder, *options)
    assert answer(QUESTION, "--prompt-cache-file", file) == whole
    talked = run("chat", "--model", folder, "-m", "12", *FP32, *options, text=f"{DOCUMENT}{QUESTION}\n")
    assert talked.stdout == whole
    said = complaint("generate", "-p", "x", "--prompt-cache-file", file, "--kv-bits", "8", *FP32)
    assert said == "the KV cache has 4 bits in groups of 32, not 8 bits in groups of 64"


@pytest.mark.parametrize("command", ["generate", "chat", "cache-prompt"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kv-bits", "5"], "a KV cache can have 4 or 8 bits and groups of 32, 64 or 128, not 5 and 64"),
        (["--kv-bits", "8", "--quantized-kv-start", "-3"], "quantized_kv_start must not be negative, but is -3"),
    ],
)
def test_bad_options_before_any_loading(command: str, options: list[str], said: str, file: Path) -> None:
    needed = {"generate": ["-p", "x"], "chat": [], "cache-prompt": ["-p", "x", "--prompt-cache-file", str(file)]}
    assert complaint(command, "--model", "/no/such", *needed[command], *options) == said


def test_bad_files(folder: Path, file: Path) -> None:
    for command in (["generate", "-p", "x"], ["chat"]):
        assert complaint(*command, "--prompt-cache-file", file) == f"{file}: No such file or directory"
    cached(folder, file)
    said = complaint("generate", "-p", "x", "--prompt-cache-file", file, "--system-prompt", "y")
    assert said == "--system-prompt: comes before what is in --prompt-cache-file; give it to cache-prompt"
    said = complaint("generate", "-p", "x", "--prompt-cache-file", file, "--model", mlx_checkpoint("llama"))
    assert said == f"{file}: the prompt cache of another model than this llama"
    nowhere = file.parent / "none" / "file"
    said = complaint("cache-prompt", "--model", folder, "-p", "x", "--prompt-cache-file", nowhere)
    assert said == f"{nowhere}: its folder does not exist"
