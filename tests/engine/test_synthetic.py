"""Models of random weights and the tokenizer that stands in for theirs."""

import json
from pathlib import Path

import pytest

from gfxlm import SamplingParams
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import built_in_folder
from gfxlm.engine.synthetic import load_synthetic, stand_in_tokenizer
from gfxlm.errors import UserError


def test_text_becomes_bytes_and_comes_back() -> None:
    tokenizer = stand_in_tokenizer(1000)
    text = "a é 漢 \n<think>"
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_token_ids == set()


def test_every_token_above_the_bytes_is_a_whole_word() -> None:
    tokenizer = stand_in_tokenizer(600)
    assert len(tokenizer) == 600
    detokenizer = tokenizer.detokenizer()
    words = [detokenizer.add(token) for token in range(256, 600)]
    assert words == [f" {token}" for token in range(256, 600)]
    assert detokenizer.finish() == ""


def test_a_chat_has_a_prompt() -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompt = stand_in_tokenizer(300).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "user: hi\nassistant: "


def test_a_synthetic_model_writes_as_much_as_it_is_asked_to(tmp_path: Path) -> None:
    config = json.loads((built_in_folder() / "config.json").read_text())
    for name in ("quantization", "quantization_config"):
        config.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen: list[tuple[int, int]] = []
    model, tokenizer = load_synthetic(str(tmp_path), device="cpu", progress=lambda *counts: seen.append(counts))
    assert seen[-1][0] == seen[-1][1] > 0
    engine = Engine(model, eos_token_ids=tokenizer.eos_token_ids, max_context=64)
    request = engine.add(tokenizer.encode("hello"), SamplingParams(max_tokens=20))
    while engine.busy:
        engine.step()
    assert len(request.tokens) == 20
    assert request.finish_reason == "length"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="qwen3-8b"):
        load_synthetic("qwen9", device="cpu")
