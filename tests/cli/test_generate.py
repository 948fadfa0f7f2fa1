"""`gfxlm generate`, option by option, against the Python functions it stands for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gfxlm
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.models.base import CausalLM
from tests.checkpoints import mlx_checkpoint
from tests.cli.runner import complaint, run

PROMPT = "def add_1(x):"


@pytest.fixture(scope="module")
def folder() -> Path:
    return mlx_checkpoint("qwen3")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[CausalLM, Tokenizer]:
    return gfxlm.load(folder)


def answer(folder: Path, *options: str, prompt: str = PROMPT) -> str:
    result = run("generate", "--model", folder, "-p", prompt, "-m", "12", "--quiet", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.removesuffix("\n")


def expected(loaded: tuple[CausalLM, Tokenizer], prompt: str | list[int] = PROMPT, **options: Any) -> str:
    return gfxlm.generate(*loaded, prompt, **{"max_tokens": 12, **options})


def chat(loaded: tuple[CausalLM, Tokenizer], *messages: tuple[str, str], **options: Any) -> list[int]:
    options = {"add_generation_prompt": True, **options}
    return loaded[1].apply_chat_template([{"role": role, "content": text} for role, text in messages], **options)


def test_chat_template_by_default(folder: Path, loaded: tuple[CausalLM, Tokenizer]) -> None:
    assert answer(folder) == expected(loaded, chat(loaded, ("user", PROMPT)))
    system = chat(loaded, ("system", "Be brief."), ("user", PROMPT))
    assert answer(folder, "--system-prompt", "Be brief.") == expected(loaded, system)
    assert answer(folder, "--ignore-chat-template") == expected(loaded)


def test_prefilled_response_is_continued(folder: Path, loaded: tuple[CausalLM, Tokenizer]) -> None:
    tokens = loaded[1].encode(f"<|user|>{PROMPT}<|end|><|assistant|> return")
    assert answer(folder, "--prefill-response", " return") == expected(loaded, tokens)


def test_arguments_reach_the_template(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "chat_template.jinja").write_text("{{ greeting }}{{ messages[0].content }}")
    told = answer(copy, "--chat-template-config", '{"greeting": "# plus 7"}')
    assert told == expected(gfxlm.load(folder), "# plus 7" + PROMPT)


def test_escapes_in_the_prompt_and_in_stop_strings(folder: Path, loaded: tuple[CausalLM, Tokenizer]) -> None:
    assert answer(folder, "--ignore-chat-template", prompt=r"x\n\ty") == expected(loaded, "x\n\ty")
    (newline,) = loaded[1].encode("\n")
    only_newlines = ("--ignore-chat-template", "--logit-bias", f'{{"{newline}": 1000}}')
    assert answer(folder, *only_newlines) == "\n" * 12
    assert answer(folder, *only_newlines, "--stop", "never there", "--stop", r"\n\n\n") == ""


@pytest.mark.parametrize(
    ("options", "params"),
    [
        (["--temp", "0.8"], {"temperature": 0.8}),
        (["--temperature", "1", "--top-p", "0.5"], {"temperature": 1.0, "top_p": 0.5}),
        (["--temp", "1", "--top-k", "3"], {"temperature": 1.0, "top_k": 3}),
        (
            ["--temp", "1", "--min-p", "0.2", "--min-tokens-to-keep", "2"],
            {"temperature": 1.0, "min_p": 0.2, "min_tokens_to_keep": 2},
        ),
        (
            ["--repetition-penalty", "5", "--repetition-context-size", "9"],
            {"repetition_penalty": 5.0, "repetition_context_size": 9},
        ),
        (["--presence-penalty", "4"], {"presence_penalty": 4.0}),
        (["--frequency-penalty", "4"], {"frequency_penalty": 4.0}),
        (["--logit-bias", '{"30": 100}'], {"logit_bias": {30: 100.0}}),
        (["--prefill-step-size", "2"], {"prefill_step_size": 2}),
    ],
)
def test_sampling_options(
    options: list[str], params: dict[str, Any], folder: Path, loaded: tuple[CausalLM, Tokenizer]
) -> None:
    seeded = answer(folder, "--ignore-chat-template", "--seed", "3", *options)
    assert seeded == expected(loaded, seed=3, **params)
    if "prefill_step_size" not in params:
        assert seeded != expected(loaded)


def test_xtc_spares_newline_and_end(folder: Path, loaded: tuple[CausalLM, Tokenizer]) -> None:
    options = ["--temp", "1", "--xtc-probability", "1", "--xtc-threshold", "0.001", "--seed", "3"]
    params = {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.001, "seed": 3}
    special = [*loaded[1].encode("\n"), *loaded[1].eos_token_ids]
    spared = expected(loaded, **params, xtc_special_tokens=special, max_tokens=100)
    assert answer(folder, "--ignore-chat-template", "-m", "100", *options) == spared


def test_further_end_tokens(folder: Path, loaded: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = loaded
    tokens = [r.token for r in gfxlm.stream_generate(model, tokenizer, PROMPT, max_tokens=12)]
    end = tokens[6]
    cut = tokenizer.decode(tokens[: tokens.index(end)])
    name = tokenizer.convert_ids_to_tokens(end)
    assert answer(folder, "--ignore-chat-template", "--extra-eos-token", str(name)) == cut
    assert answer(folder, "--ignore-chat-template", "--extra-eos-token", str(end)) == cut
    assert complaint("generate", "--model", folder, "-p", "x", "--extra-eos-token", "no such token")


def test_defaults_come_from_the_model_and_flags_win(
    folder: Path, loaded: tuple[CausalLM, Tokenizer], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.9, "top_k": 7}))
    raw = ("--ignore-chat-template", "--seed", "3")
    assert answer(copy, *raw) == expected(loaded, seed=3, temperature=0.9, top_k=7)
    assert answer(copy, *raw, "--temp", "2", "--top-k", "0") == expected(loaded, seed=3, temperature=2.0, top_k=0)
    assert answer(copy, *raw, "--temp", "0") == expected(loaded)


def test_statistics_are_mlx_lms(folder: Path, loaded: tuple[CausalLM, Tokenizer]) -> None:
    result = run("generate", "--model", folder, "-p", PROMPT, "-m", "3", "--ignore-chat-template")
    prompt, generation, memory = result.stderr.splitlines()
    assert prompt.startswith(f"Prompt: {len(loaded[1].encode(PROMPT))} tokens, ")
    assert prompt.endswith(" tokens-per-sec")
    assert generation.startswith("Generation: 3 tokens, ")
    assert memory.startswith("Peak memory: ")


def test_dtype(folder: Path) -> None:
    text = answer(folder, "--ignore-chat-template", "--dtype", "float32", "-m", "40")
    assert text == gfxlm.generate(*gfxlm.load(folder, dtype=torch.float32), PROMPT, max_tokens=40)


def test_nan_ends_with_code_2_and_names_the_layer(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(mlx_checkpoint("qwen3", "dense"), tmp_path / "model"))
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, {"format": "mlx"})
    said = complaint("generate", "--model", copy, "-p", "x", code=2)
    assert "model.layers.1.mlp.down_proj" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "/no/such"], "/no/such: no such folder (and a hub name reads owner/model)"),
        (["--top-p", "7"], "top_p must be a number from 0 to 1, but is 7.0"),
        (["-m", "0"], "max_tokens must be an integer of at least 1, but is 0"),
        (["--stop", ""], "stop must be strings that are not empty, but holds ''"),
        (["--logit-bias", "[1]"], "--logit-bias: expected a JSON object, but got [1]"),
        (["--logit-bias", '{"a": 1}'], "--logit-bias: 'a' is no token id"),
        (["--chat-template-config", "{x"], "--chat-template-config: not valid JSON"),
        (["--device", "abacus"], "device 'abacus': "),
    ],
)
def test_bad_options(options: list[str], said: str, folder: Path) -> None:
    assert complaint("generate", "-p", "x", "--model", folder, *options).startswith(said)


def test_prompt_longer_than_the_context(folder: Path) -> None:
    said = complaint("generate", "--model", folder, "-p", "漢 " * 1100)
    assert said.endswith("tokens, but the context holds 1024")


def test_no_template(folder: Path, loaded: tuple[CausalLM, Tokenizer], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "chat_template.jinja").unlink()
    assert answer(copy) == expected(loaded)
    assert complaint("generate", "--model", copy, "-p", "x", "--system-prompt", "y").endswith("this model has none")
    said = complaint("generate", "--model", folder, "-p", "x", "--ignore-chat-template", "--prefill-response", "y")
    assert said.endswith("--ignore-chat-template is given")


def test_stdin_that_is_no_text(folder: Path) -> None:
    said = complaint("generate", "--model", folder, "-p", "-", text=b"a\xffb")
    assert said == "stdin: not UTF-8 text (byte 1 is 0xff)"
