from functools import cache

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from gfxlm.engine.detokenizer import StreamingDetokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Größe, façade, naïve, Ελληνικά, Привет, 日本語のテキスト、中文文本。",
    "emoji 😀😀👩‍👩‍👧‍👦🇩🇪 and combining e\u0301 a\u0308 n\u0303",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40)
WORDS = st.lists(st.sampled_from([" the", "dog", "日本", "😀", "👩‍👩‍👧‍👦", "e\u0301", "\n", "  "]), max_size=40).map(
    "".join
)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<unk>", "<s>", *BYTES, "▁", "▁the", "▁dog", "s", "日", "o", "▁▁"]
SPACE, THE, S, UNKNOWN = PIECES.index("▁"), PIECES.index("▁the"), PIECES.index("s"), 999


@cache
def byte_level() -> tokenizers.Tokenizer:
    """A small byte-level BPE, with merges that cross the borders of characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>")])
    tokenizer.add_tokens([AddedToken("<tool call>"), AddedToken("<denkt>")])
    return tokenizer


@cache
def sentence_piece() -> tokenizers.Tokenizer:
    """Pieces with U+2581 for a space, one token per byte for the rest, and a decoder as Llama 2 has it."""
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>")])
    return tokenizer


class CountingDecoder:
    """Shows special tokens, as the streams of a model do, and counts the tokens it was asked to decode."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoded = 0

    def decode(self, token_ids: list[int]) -> str:
        self.decoded += len(token_ids)
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)


def segments(tokenizer: tokenizers.Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = StreamingDetokenizer(CountingDecoder(tokenizer))
    return [*map(detokenizer.add, ids), detokenizer.finish()]


def whole(tokenizer: tokenizers.Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def bytes_as_tokens(data: bytes, tokenizer: tokenizers.Tokenizer) -> list[int]:
    if tokenizer is sentence_piece():
        return [tokenizer.token_to_id(BYTES[byte]) for byte in data]
    # ByteLevel writes a byte as its Latin-1 letter where that is printable, else as one from U+0100 onwards.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [tokenizer.token_to_id(chr(byte) if byte in printable else chr(256 + hidden.index(byte))) for byte in data]


class TestByteLevel:
    @given(TEXT | WORDS)
    def test_text(self, text):
        ids = byte_level().encode(text).ids
        parts = segments(byte_level(), ids)
        assert "".join(parts) == whole(byte_level(), ids) == text
        assert not any("\ufffd" in part for part in parts)

    @given(st.lists(st.integers(0, 420), max_size=120))
    def test_any_tokens(self, ids):
        # 400 and above: added tokens, then ids that no token has.
        assert "".join(segments(byte_level(), ids)) == whole(byte_level(), ids)

    @given(st.binary(max_size=120) | st.lists(st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x41]), max_size=300))
    @example([0xF0, 0x9F, 0x98] * 60 + [0x80])
    @example([0xFF] * 200)
    def test_any_bytes(self, data):
        ids = bytes_as_tokens(bytes(data), byte_level())
        assert "".join(segments(byte_level(), ids)) == bytes(data).decode("utf-8", "replace")

    @given(TEXT)
    def test_a_character_comes_with_its_last_byte(self, text):
        detokenizer = StreamingDetokenizer(byte_level())
        for character in text:
            *first, last = bytes_as_tokens(character.encode(), byte_level())
            assert not any(map(detokenizer.add, first))
            assert detokenizer.add(last) == character

    def test_invalid_bytes_are_not_held_back_for_ever(self):
        detokenizer = StreamingDetokenizer(byte_level())
        out = ""
        for n, token in enumerate(bytes_as_tokens(b"\xff" * 200, byte_level()), start=1):
            out += detokenizer.add(token)
            assert n - 3 <= len(out) <= n
        assert out + detokenizer.finish() == "\ufffd" * 200

    def test_a_replacement_character_that_was_meant(self):
        ids = byte_level().encode("a\ufffdb\ufffd").ids
        assert "".join(segments(byte_level(), ids)) == "a\ufffdb\ufffd"

    @pytest.mark.parametrize(
        "token", ["the", "\xff", "<|end|>", None], ids=["text", "invalid byte", "special", "unknown id"]
    )
    def test_work_per_token_is_bounded(self, token):
        known = {"the": byte_level().encode("the").ids[0], "\xff": bytes_as_tokens(b"\xff", byte_level())[0]}
        token_id = 10_000 if token is None else known.get(token, byte_level().token_to_id(token))
        decoder = CountingDecoder(byte_level())
        detokenizer = StreamingDetokenizer(decoder)
        for _ in range(2000):
            detokenizer.add(token_id)
        assert decoder.decoded / 2000 < 100


class TestSentencePiece:
    @given(st.lists(st.sampled_from(["▁", "▁the", "▁dog", "s", "日", "o", "▁▁", "<s>", "😀", "é", "本"]), max_size=80))
    @example(["▁", "▁", "▁dog"])
    @example(["<s>", "▁the"])
    @example(["😀"] * 30)
    def test_pieces_and_characters_in_bytes(self, pieces):
        tokenizer = sentence_piece()
        ids = []
        for piece in pieces:
            token = tokenizer.token_to_id(piece)
            ids += bytes_as_tokens(piece.encode(), tokenizer) if token is None else [token]
        parts = segments(tokenizer, ids)
        assert "".join(parts) == whole(tokenizer, ids)
        assert not any("\ufffd" in part for part in parts)

    @given(st.lists(st.integers(256, 320), max_size=120))
    @example([S, *[UNKNOWN] * 40, THE])
    @example([*[UNKNOWN] * 40, SPACE, THE])
    def test_any_pieces_and_unknown_ids(self, ids):
        assert "".join(segments(sentence_piece(), ids)) == whole(sentence_piece(), ids)

    def test_characters_come_one_by_one(self):
        detokenizer = StreamingDetokenizer(CountingDecoder(sentence_piece()))
        parts = [detokenizer.add(token) for token in bytes_as_tokens("本😀".encode() * 20, sentence_piece())]
        assert parts == ["", "", "本", "", "", "", "😀"] * 20

    @given(st.binary(max_size=100))
    def test_invalid_bytes_do_no_lasting_harm(self, data):
        tokenizer = sentence_piece()
        after = [tokenizer.token_to_id(piece) for piece in ("▁dog", "s", "▁the")]
        parts = segments(tokenizer, bytes_as_tokens(data, tokenizer) + after)
        assert "".join(parts).endswith(" dogs the" if data else "dogs the")


def test_word_pieces():
    vocabulary = {"[UNK]": 0, "un": 1, "##aff": 2, "##able": 3, "dog": 4, ".": 5}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    ids = [1, 2, 3, 4, 5, 1, 4] * 10
    assert "".join(segments(tokenizer, ids)) == whole(tokenizer, ids)
    assert whole(tokenizer, ids).startswith("unaffable dog . un dog")
