import copy
import subprocess
import sys
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load as mlx_load
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from gfxlm.engine.tokenizer import Tokenizer, load_tokenizer
from gfxlm.errors import UserError

TEMPLATE = """{%- for message in messages -%}
{%- if message.role == 'tool' and loop.first %}{{ raise_exception('A tool cannot speak first.') }}{% endif -%}
<|{{ message.role }}|>{{ message.content.strip() }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>{% endif %}{% endif -%}"""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is Zürich? "},
    {"role": "assistant", "content": "In Switzerland."},
    {"role": "user", "content": "Thanks 😀"},
]
MARKS = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def save_tokenizer(folder: Path, *, template: str | None = TEMPLATE, thinking: bool = True) -> Path:
    """A checkpoint's tokenizer files: byte-level BPE that begins each text with <|begin|>."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        ["Be brief. Where is it? In Switzerland."],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    rust.add_special_tokens([AddedToken(mark) for mark in MARKS])
    if thinking:
        rust.add_tokens(["<think>", "</think>"])
    begin = rust.token_to_id("<|begin|>")
    rust.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=True,
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder, [7])


def test_special_tokens_are_added_once(tokenizer):
    begin = tokenizer.bos_token_id
    plain = tokenizer.encode("Where is it?")
    assert plain[0] == begin
    assert tokenizer.encode("<|begin|>Where is it?") == plain
    assert tokenizer.encode("Where is it?", add_special_tokens=False) == plain[1:]
    assert tokenizer.decode(plain) == "<|begin|>Where is it?"
    assert tokenizer.decode(plain, skip_special_tokens=True) == "Where is it?"


def test_spaces_are_not_cleaned_up(tokenizer):
    text = "a , b . c n't  d"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_streaming_is_decoding(tokenizer):
    ids = tokenizer.encode("Zürich , 😀 <|end|>日本")
    detokenizer = tokenizer.detokenizer()
    parts = [*map(detokenizer.add, ids), detokenizer.finish()]
    assert "".join(parts) == tokenizer.decode(ids) == "<|begin|>Zürich , 😀 <|end|>日本"
    assert tokenizer.detokenizer() is not detokenizer


def test_eos_token_ids(folder, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokenizer.eos_token_ids == {7, end}
    assert load_tokenizer(folder).eos_token_ids == {end}
    assert load_tokenizer(folder, 5).eos_token_ids == {5, end}


def test_the_rest_is_the_transformers_tokenizer(tokenizer):
    assert len(tokenizer) == len(tokenizer.get_vocab())
    assert tokenizer.bos_token == "<|begin|>"
    assert copy.copy(tokenizer).eos_token_ids == tokenizer.eos_token_ids
    with pytest.raises(AttributeError, match="no_such_thing"):
        tokenizer.no_such_thing  # noqa: B018


def test_tokenizer_config_reaches_transformers(folder):
    assert load_tokenizer(folder, eos_token="<|user|>").eos_token == "<|user|>"


@pytest.mark.parametrize("generation_prompt", [{}, {"add_generation_prompt": True}, {"add_generation_prompt": False}])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("template_kwargs", [{}, {"enable_thinking": False}], ids=["default", "no thinking"])
def test_chat_as_in_mlx_lm(tmp_path, thinking, generation_prompt, template_kwargs):
    folder = save_tokenizer(tmp_path, thinking=thinking)
    options = template_kwargs | generation_prompt
    theirs = mlx_load(folder).apply_chat_template(CHAT, **options)
    ours = load_tokenizer(folder).apply_chat_template(CHAT, **options)
    assert type(ours) is list
    assert all(type(token) is int for token in ours)
    assert ours == theirs


def test_chat_as_text(tokenizer):
    text = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>Where is Zürich?<|end|><|assistant|><think>"
    assert tokenizer.decode(tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)) == text


def test_developer_is_system_where_unknown(tmp_path, tokenizer):
    chat = [{"role": "developer", "content": "Be brief."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith("<|system|>Be brief.")
    assert chat[0]["role"] == "developer"
    knows = load_tokenizer(save_tokenizer(tmp_path, template="{# developer #}" + TEMPLATE))
    assert knows.apply_chat_template(chat, tokenize=False).startswith("<|developer|>Be brief.")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty: a chat needs at least one message"),
        ([*CHAT, {"role": "bot", "content": "Hi"}], r"messages\[4\] has role 'bot'; known are system, developer"),
        (["Hi"], r"messages\[0\] must be an object with a role, but is 'Hi'"),
        ([{"content": "Hi"}], r"messages\[0\] must be an object with a role, but is {'content': 'Hi'}"),
        (
            [{"role": "tool", "content": "4"}],
            r"the chat template refuses these messages: A tool cannot speak first\.",
        ),
        ([{"role": "user"}], r"the chat template refuses these messages: .*has no attribute 'content'"),
        ([{"role": "user", "content": 5}], r"the chat template refuses these messages: .*has no attribute 'strip'"),
    ],
)
def test_refused_chats(tokenizer, messages, message):
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.apply_chat_template(messages)
    assert "\n" not in str(caught.value)


def test_no_chat_template(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(UserError, match="no chat template: pass the prompt as plain text"):
        tokenizer.apply_chat_template(CHAT)


def test_has_chat_template(tokenizer):
    assert tokenizer.has_chat_template


def test_no_tokenizer_files(tmp_path):
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"no tokenizer in {tmp_path}: looked for tokenizer.json, tokenizer.model, vocab.json, tekken.json, *.tiktoken"
    )


def test_a_broken_tokenizer_file(tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0",\n')
    with pytest.raises(UserError, match="cannot read the tokenizer in") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_import_does_not_import_transformers():
    program = "import sys, gfxlm.engine.tokenizer; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
