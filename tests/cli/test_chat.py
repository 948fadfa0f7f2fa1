"""`gfxlm chat`, with its input from a pipe."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import gfxlm
from gfxlm.cli import chat
from gfxlm.engine.conversation import Conversation
from tests.checkpoints import mlx_checkpoint
from tests.cli.runner import complaint, run


@pytest.fixture(scope="module")
def folder() -> Path:
    return mlx_checkpoint("qwen3")


def conversation(folder: Path, **options: Any) -> Conversation:
    return Conversation(*gfxlm.load(folder), **options)


def say(conversation: Conversation, question: str, **options: Any) -> str:
    return "".join(response.text for response in conversation.ask(question, **options))


def test_turns_on_stdout_the_rest_on_stderr(folder: Path) -> None:
    result = run("chat", "--model", folder, "-m", "6", text="one\n\n/help\ntwo\n/reset\none\n")
    ours = conversation(folder)
    one, two = (say(ours, question, max_tokens=6) for question in ("one", "two"))
    assert result.exit_code == 0
    assert result.stdout == f"{one}\n{two}\n{one}\n"
    cut = "(stopped after 6 tokens, as --max-tokens says)\n"
    assert result.stderr == cut + chat._HELP + "\n" + cut + "The conversation is forgotten.\n" + cut


@pytest.mark.parametrize("end", ["/exit", "/quit", "q", ""])
def test_ends(folder: Path, end: str) -> None:
    result = run("chat", "--model", folder, "-m", "2", text=f"{end}\n/nonsense\n" if end else "")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_mlx_lms_letters(folder: Path) -> None:
    result = run("chat", "--model", folder, text="h\nr\nq\n")
    assert result.stdout == ""
    assert result.stderr == f"{chat._HELP}\nThe conversation is forgotten.\n"


def test_unknown_commands_are_no_questions(folder: Path) -> None:
    result = run("chat", "--model", folder, "-m", "3", text="/rest\n/usr/lib\n")
    assert result.stderr.splitlines()[0] == "/rest is no command; /help lists them."
    assert result.stdout == say(conversation(folder), "/usr/lib", max_tokens=3) + "\n"


def test_options(folder: Path) -> None:
    result = run(
        "chat", "--model", folder, "-m", "5", "--system-prompt", "Be brief.", "--temp", "1", "--seed", "4", text="one\n"
    )
    ours = conversation(folder, system_prompt="Be brief.")
    assert result.stdout == say(ours, "one", max_tokens=5, temperature=1.0, seed=4) + "\n"


def test_full_context_says_so_and_offers_reset(folder: Path) -> None:
    result = run("chat", "--model", folder, "-m", "-1", "--max-context", "32", text="one\ntwo\n/reset\none\n")
    ours = conversation(folder, max_context=32)
    one = say(ours, "one", max_tokens=-1)
    assert result.stdout == f"{one}\n{one}\n"
    full = "(the context of 32 tokens is full; /reset starts a new conversation)"
    first, second, third, fourth = result.stderr.splitlines()
    assert (first, third, fourth) == (full, "The conversation is forgotten.", full)
    assert second.startswith("gfxlm: the prompt has ")
    assert second.endswith("but the context holds 32; /reset starts a new conversation")


def test_failed_answer_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = gfxlm.engine.load.load

    def broken(*arguments: Any, **options: Any) -> Any:
        model, tokenizer = load(*arguments, **options)
        model.model.norm.weight[0] = torch.nan
        return model, tokenizer

    monkeypatch.setattr("gfxlm.engine.load.load", broken)
    result = run("chat", "--model", folder, text="one\n/help\n")
    assert (result.exit_code, result.stdout) == (0, "")
    failure, *rest = result.stderr.splitlines()
    assert failure.startswith("gfxlm: the logits are not finite")
    assert "\n".join(rest) == chat._HELP


def test_without_a_template_it_says_so_once(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "chat_template.jinja").unlink()
    result = run("chat", "--model", copy, "-m", "4", text="one\ntwo\n")
    ours = conversation(copy)
    assert result.stdout == "".join(say(ours, question, max_tokens=4) + "\n" for question in ("one", "two"))
    assert result.stderr.count("no chat template") == 1
    assert complaint("chat", "--model", copy, "--chat-template-config", '{"a": 1}').endswith("no chat template")


def test_bad_context(folder: Path) -> None:
    said = complaint("chat", "--model", folder, "--max-context", "1025")
    assert said == "max_context must be from 1 to the model's 1024, but is 1025"


def test_second_ctrl_c_at_the_prompt_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_read_line", interrupt)
    result = run("chat", "--model", folder)
    assert result.exit_code == 130
    assert result.stderr == "\nCtrl-C once more ends the program, and so does /exit.\n"
