"""Grammars and their masks, bit by bit against a plain look at every token of the vocabulary."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gfxlm
from gfxlm.engine.grammar import Grammar, Grammars, TokenMatcher, _bits
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.sampler import Features, Sampler, ban
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError

pytest.importorskip("llguidance")

_, TOKENIZER = gfxlm.load("builtin")
VOCAB = 6144
END = 0
TEXTS = {token: TOKENIZER.decode([token]) for token in range(VOCAB)}
SPECIAL = set(TOKENIZER.all_special_ids)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, VOCAB)


def tokens_of(mask: Tensor, vocab_size: int = VOCAB) -> set[int]:
    bits = mask[:, None].numpy().view("uint8").reshape(-1)
    return {token for token in range(vocab_size) if bits[token // 8] >> token % 8 & 1}


def allowed_by(grammars: Grammars, matcher: TokenMatcher, vocab_size: int = VOCAB) -> set[int]:
    return tokens_of(grammars.masks([matcher])[0], vocab_size)


def after(grammars: Grammars, grammar: Grammar, text: str) -> TokenMatcher:
    matcher = grammars.matcher(grammar)
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        assert token in allowed_by(grammars, matcher)
        matcher.accept(token)
    return matcher


STRINGS = st.lists(st.text('ab 1{"', min_size=1, max_size=8), min_size=1, max_size=4, unique=True)


@settings(max_examples=40, deadline=None)
@given(strings=STRINGS, data=st.data())
def test_masks_hold_what_a_plain_search_finds(grammars: Grammars, strings: list[str], data: st.DataObject) -> None:
    matcher, done = grammars.matcher(Grammar.choice(strings)), ""
    while True:
        next_ones = {string[len(done) : len(done) + 1] for string in strings if string.startswith(done)}
        expected = {
            token
            for token, text in TEXTS.items()
            if token not in SPECIAL and text and any(string.startswith(done + text) for string in strings)
        }
        expected |= {END} if done in strings else set()
        allowed = allowed_by(grammars, matcher)
        # Where the text can go on in one way only, llguidance wants it in the tokenizer's own tokens.
        assert allowed == expected if len(next_ones) > 1 else allowed and allowed <= expected
        assert matcher.error is None
        token = data.draw(st.sampled_from(sorted(allowed)))
        if token == END:
            break
        matcher.accept(token)
        done += TEXTS[token]
    assert done in strings


def test_the_end_is_forced_where_nothing_else_can_follow(grammars: Grammars) -> None:
    matcher = after(grammars, Grammar("regex", "[ab]{3}"), "aba")
    assert allowed_by(grammars, matcher) == {END}
    matcher = after(grammars, Grammar("regex", "[ab]{1,3}"), "ab")
    assert allowed_by(grammars, matcher) == {END, *(t for t, text in TEXTS.items() if text in ("a", "b"))}


def test_matchers_of_one_grammar_go_their_own_ways(grammars: Grammars) -> None:
    grammar = Grammar("regex", "a+|b+")
    matchers = [after(grammars, grammar, text) for text in ("a", "b", "")]
    for mask, letter in zip(grammars.masks(matchers), ("a", "b", "[ab]"), strict=True):
        allowed = {TEXTS[token] for token in tokens_of(mask) - {END}}
        assert allowed
        assert all(re.fullmatch("a+|b+", text) and re.match(letter, text) for text in allowed)


@pytest.mark.parametrize("vocab_size", [VOCAB + 131, VOCAB - 37])
def test_a_models_vocabulary_may_be_of_another_size(vocab_size: int) -> None:
    grammars = Grammars(TOKENIZER, vocab_size)
    small = min(VOCAB, vocab_size)
    for grammar in (Grammar("regex", "(?s).*"), Grammar("regex", "x", after=5)):
        matchers = [grammars.matcher(grammar), grammars.matcher(grammar)]
        assert grammars.masks(matchers).shape == (2, -(-vocab_size // 32))
        usual = Grammars(TOKENIZER, VOCAB)
        plain = allowed_by(usual, usual.matcher(grammar))
        for mask in grammars.masks(matchers):
            assert tokens_of(mask, vocab_size) == {token for token in plain if token < small}


def test_what_comes_before_a_token_is_free_but_has_no_end(grammars: Grammars) -> None:
    end_of_thought = TOKENIZER.encode("z", add_special_tokens=False)[0]
    matcher = grammars.matcher(Grammar("choice", '["yes", "no"]', after=end_of_thought))
    for text in ("let me", " see: yes", "{"):
        assert allowed_by(grammars, matcher) == set(range(VOCAB)) - {END}
        for token in TOKENIZER.encode(text, add_special_tokens=False):
            matcher.accept(token)
    matcher.accept(end_of_thought)
    for token in TOKENIZER.encode("no", add_special_tokens=False):
        matcher.accept(token)
    assert allowed_by(grammars, matcher) == {END}


def test_a_dead_end_allows_nothing_and_says_why(grammars: Grammars) -> None:
    stuck = after(grammars, Grammar("lark", 'start: "a" X\nX: /b/ & /c/'), "a")
    others = [grammars.matcher(Grammar("regex", "x")), after(grammars, Grammar("regex", "a[xy]"), "a")]
    masks = grammars.masks([others[0], stuck, others[1]])
    assert masks.any(dim=1).tolist() == [True, False, True]
    assert stuck.error
    assert not any(matcher.error for matcher in others)


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar("regex", "[ab"), "regex: .*unclosed character class"),
        (Grammar("json_schema", "{"), "json_schema: Expecting property name"),
        (Grammar("json_schema", '{"not": {}}'), 'json_schema: Unimplemented keys: ."not"'),
        (Grammar("json_schema", '{"type": "strung"}'), "json_schema: Invalid type: strung"),
        (Grammar("json_object", "{}"), "json_object: takes no text"),
        (Grammar("lark", "start: foo"), 'lark: .*unknown name: "foo"'),
        (Grammar("choice", "[]"), "choice: takes a JSON list"),
        (Grammar("choice", "[1]"), "choice: takes a JSON list"),
        (Grammar("json_schema", '{"anyOf": [' * 9999), "json_schema: maximum recursion depth"),
        (Grammar("regex", "(" * 9999), r"regex: .*\(\(…"),
        (Grammar("regex", "\ud800"), "regex: .*surrogates"),
    ],
)
def test_grammars_that_do_not_compile(grammars: Grammars, grammar: Grammar, says: str) -> None:
    for ask in (grammars.check, grammars.matcher):
        with pytest.raises(UserError, match=says) as raised:
            ask(grammar)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 500


def test_an_unknown_kind() -> None:
    with pytest.raises(UserError, match="one of json_schema, json_object, regex, lark, choice, but is 'ebnf'"):
        Grammar("ebnf")


class Other:
    """A tokenizer of another kind."""

    eos_token_id = None

    def __init__(self, eos_token_id: int | None) -> None:
        self.eos_token_id = eos_token_id

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}

    def __len__(self) -> int:
        return 2


def test_tokenizers_that_do_not_do() -> None:
    with pytest.raises(UserError, match=r"needs a tokenizer\.json"):
        Grammars(Tokenizer(Other(1)), 2).check(Grammar("json_object"))
    with pytest.raises(UserError, match="needs a token that ends a text"):
        Grammars(Tokenizer(Other(None)), 2).check(Grammar("json_object"))


def test_json_has_bounded_white_space(grammars: Grammars) -> None:
    pretty = json.dumps({"a": [1, {"b": None}], "c": "d"}, indent=4)
    assert END in allowed_by(grammars, after(grammars, Grammar("json_object"), pretty))
    matcher = after(grammars, Grammar("json_object"), "{" + " " * 40)
    assert not any(TEXTS[token].startswith((" ", "\n")) for token in allowed_by(grammars, matcher))


@given(tokens=st.sets(st.integers(0, 130)), vocab_size=st.integers(1, 131))
def test_bits(tokens: set[int], vocab_size: int) -> None:
    kept = {token for token in tokens if token < vocab_size}
    mask = _bits(tokens, vocab_size)
    assert mask.dtype == torch.int32
    assert tokens_of(mask, vocab_size) == kept
    logits = torch.arange(vocab_size, dtype=torch.float32)[None]
    banned = ban(logits, mask[None])
    assert {token for token in range(vocab_size) if banned[0, token] == token} == kept
    assert int(banned.isinf().sum()) == vocab_size - len(kept)


def test_many_masks_are_those_of_each(grammars: Grammars) -> None:
    wanted = [Grammar("regex", f"[a-{chr(98 + i)}]{{2}}", after=[None, 65][i % 5 == 4]) for i in range(20)]
    matchers = [grammars.matcher(grammar) for grammar in wanted]
    alone = torch.cat([grammars.masks([matcher]) for matcher in matchers])
    assert torch.equal(grammars.masks(matchers), alone)
    assert len(alone.unique(dim=0)) == 17  # those that are free have the same


def test_nothing_banned_comes_through_at_temperature_5(grammars: Grammars) -> None:
    grammar = Grammar("regex", "([0-9a-f]{2} ?)*")
    matchers = [grammars.matcher(grammar) for _ in range(8)]
    sampler = Sampler(8, VOCAB)
    for slot in range(8):
        sampler.set(slot, SamplingParams(temperature=5.0, seed=slot, grammar=grammar, logit_bias={END: -100}))
    texts: list[list[int]] = [[] for _ in matchers]
    for step in range(250):
        sampler.allow(range(8), grammars.masks(matchers))
        logits = 3 * torch.randn(8, VOCAB)
        logits[:, -500:] += 20  # much likelier, and banned as a rule
        for slot, token in enumerate(sampler.sample(logits, torch.arange(8), torch.full((8,), step)).tokens.tolist()):
            matchers[slot].accept(token)
            texts[slot].append(token)
    for tokens in texts:
        assert re.fullmatch("([0-9a-f]{2} ?)*[0-9a-f]?", TOKENIZER.decode(tokens))


def test_the_sampler_masks_the_slots_that_have_a_grammar_alone() -> None:
    sampler = Sampler(4, 100)
    for slot in (1, 3):
        sampler.set(slot, SamplingParams(grammar=Grammar("json_object"), logprobs=True))
    sampler.allow([3, 1], torch.stack([_bits({97, 98}, 100), _bits({0, 31, 32}, 100)]))
    logits = torch.randn(4, 100, dtype=torch.bfloat16)
    slots, positions = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    tokens, logprobs, _ = sampler.sample(logits, slots, positions)
    for row, allowed in ((1, [0, 31, 32]), (3, [97, 98])):
        expected = torch.full((100,), -torch.inf)
        expected[allowed] = logits[row, allowed].float().log_softmax(0)
        torch.testing.assert_close(logprobs[row], expected)
        assert tokens[row] == expected.argmax()
    assert tokens[[0, 2]].tolist() == logits[[0, 2]].argmax(1).tolist()
    torch.testing.assert_close(logprobs[0], logits[0].float().log_softmax(0))
    sampler.allow([1], torch.zeros(1, 4, dtype=torch.int32))
    assert sampler.sample(logits, slots, positions).tokens[1] == -1
    sampler.clear(1)
    assert sampler.sample(logits, slots, positions).tokens[1] == logits[1].argmax()
    sampler.clear(3)
    assert sampler.features == Features()
