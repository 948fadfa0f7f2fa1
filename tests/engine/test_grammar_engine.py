"""Requests with a grammar in an engine: what they end with is what it describes, and nobody else notices."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gfxlm
from gfxlm.engine.decode import DecodeStep
from gfxlm.engine.drafters import PromptLookup
from gfxlm.engine.engine import Engine
from gfxlm.engine.generate import batch_generate, stream_generate
from gfxlm.engine.grammar import Grammar, Grammars
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM

PROMPT = [5, 6, 7, 8, 5, 6, 7]
DEAD_END = Grammar("lark", 'start: "a" X\nX: /b/ & /c/')


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return gfxlm.load("builtin", dtype=torch.float32, device="cpu")[0]


TOKENIZER = gfxlm.load("builtin")[1]


@pytest.fixture(scope="module")
def grammars(model: CausalLM) -> Grammars:
    pytest.importorskip("llguidance")
    return Grammars(TOKENIZER, model.config.vocab_size)


@pytest.fixture(scope="module")
def make(model: CausalLM, grammars: Grammars) -> Callable[..., Engine]:
    def engine(**options: Any) -> Engine:
        given = {"max_batch": 4, "max_context": 512, "eos_token_ids": TOKENIZER.eos_token_ids, "grammars": grammars}
        return Engine(model, **given | options)

    return engine


def run(engine: Engine, wanted: Sequence[SamplingParams]) -> list[Request]:
    """Requests that join one by one, to their ends."""
    requests = []
    for number, params in enumerate(wanted):
        requests.append(engine.add([*PROMPT, number], params))
        engine.step()
    while engine.busy:
        engine.step()
    return requests


def text_of(request: Request) -> str:
    return TOKENIZER.decode([token for token in request.tokens if token not in TOKENIZER.eos_token_ids])


def scalars() -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": 'a"b'}, {"type": ["null", "boolean"]}]),
        st.integers(-50, 50).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 7}),
        st.lists(st.text("aé\n", max_size=4) | st.integers(0, 9), min_size=1, max_size=3).map(lambda of: {"enum": of}),
        st.integers(0, 5).map(lambda length: {"type": "string", "maxLength": length}),
        st.just({"type": "string", "pattern": "^[a-c]{2,4}$"}),
    )


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.dictionaries(st.sampled_from(["a", "b c", "é"]), inner, max_size=2).flatmap(
        lambda properties: st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.just(properties),
                "required": st.just(sorted(properties)) | st.just(sorted(properties)[:1]),
                "additionalProperties": st.just(False),
            }
        )
    )
    arrays = inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2})
    return objects | arrays | st.lists(inner, min_size=1, max_size=2).map(lambda of: {"anyOf": of})


SCHEMAS = st.recursive(scalars(), nested, max_leaves=4)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schemas=st.lists(SCHEMAS, min_size=3, max_size=3), overlap=st.booleans(), seed=st.integers(0, 1000))
def test_what_ends_by_itself_is_what_the_schema_describes(
    make: Callable[..., Engine], schemas: list[dict[str, Any]], overlap: bool, seed: int
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    wanted = [
        SamplingParams(temperature=1.5, seed=seed, max_tokens=60, grammar=Grammar("json_schema", json.dumps(schema)))
        for schema in schemas
    ]
    plain = SamplingParams(temperature=1.0, seed=seed, max_tokens=20)
    *requests, free = run(make(overlap=overlap), [*wanted, plain])
    for request, schema in zip(requests, schemas, strict=True):
        assert request.error is None
        if request.finish_reason == "stop":
            jsonschema.validate(json.loads(text_of(request)), schema)
        else:
            assert (request.finish_reason, len(request.tokens)) == ("length", 60)
    assert free.error is None


def test_most_of_them_do_end(make: Callable[..., Engine]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    grammar = Grammar("json_schema", json.dumps(schema | {"additionalProperties": False}))
    requests = run(make(), [SamplingParams(temperature=1.0, seed=i, max_tokens=60, grammar=grammar) for i in range(4)])
    assert sum(request.finish_reason == "stop" for request in requests) >= 2


WANTED = [
    SamplingParams(temperature=1.0, seed=1, max_tokens=14, grammar=Grammar("regex", "([0-9]{3}-)*")),
    SamplingParams(temperature=0.8, seed=2, max_tokens=16, repetition_penalty=1.3),
    SamplingParams(max_tokens=9, grammar=Grammar.choice(["yes", "no", "perhaps so"])),
    SamplingParams(temperature=1.0, seed=3, max_tokens=20, grammar=Grammar("json_object"), frequency_penalty=0.5),
    SamplingParams(temperature=1.0, seed=4, max_tokens=12),
    SamplingParams(temperature=5.0, seed=5, max_tokens=20, grammar=Grammar("regex", "[ab]{5,8}"), top_p=0.9),
]


@pytest.mark.parametrize("max_batch", [2, 6])
def test_the_next_step_may_be_launched_before_its_mask_is_known(make: Callable[..., Engine], max_batch: int) -> None:
    ahead = run(make(overlap=True, max_batch=max_batch), WANTED)
    plain = run(make(overlap=False, max_batch=max_batch), WANTED)
    assert [request.tokens for request in ahead] == [request.tokens for request in plain]
    assert [request.finish_reason for request in ahead] == [request.finish_reason for request in plain]
    assert re.fullmatch("([0-9]{3}-)*[0-9]{0,3}", text_of(plain[0]))
    assert text_of(plain[2]) in ("yes", "no", "perhaps so")
    assert re.fullmatch("[ab]{5,8}", text_of(plain[5]))


def test_company_without_a_grammar_gets_what_it_would_without_company(make: Callable[..., Engine]) -> None:
    params = SamplingParams(temperature=0.8, seed=2, max_tokens=12, repetition_penalty=1.3)
    company = SamplingParams(temperature=1.0, max_tokens=20)
    for overlap in (True, False):
        others = (company, replace(company, grammar=Grammar("regex", "x*")))
        alone, together = (run(make(overlap=overlap), [other, params])[1] for other in others)
        assert alone.tokens == together.tokens


def test_only_grammars_are_waited_for(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("forward", "sample"):
        original = getattr(DecodeStep, name)
        monkeypatch.setattr(DecodeStep, name, lambda self, slots, n=name, f=original: calls.append(n) or f(self, slots))
    for params, expected in (
        (SamplingParams(max_tokens=6), ["forward", "sample"] * 2),
        (SamplingParams(max_tokens=6, grammar=Grammar("regex", "[ab]*")), ["forward", "sample", "forward"]),
    ):
        engine = make(overlap=True)
        request = engine.add(PROMPT, params)
        engine.step()  # the first token
        calls.clear()
        engine.step()
        assert len(request.tokens) == 2
        assert calls == expected
        engine.step()
        assert calls == ["forward", "sample"] * 3 if params.grammar is None else [*expected, "sample", "forward"]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_dead_end_is_the_end_of_one_request(make: Callable[..., Engine], overlap: bool) -> None:
    dead, *others = run(make(overlap=overlap), [SamplingParams(max_tokens=9, grammar=DEAD_END), *WANTED[:3]])
    assert dead.finish_reason == "error"
    assert dead.error.startswith("the grammar cannot go on: ")
    assert text_of(dead) == "a"
    assert not any(request.error for request in others)
    assert text_of(others[2]) in ("yes", "no", "perhaps so")


def test_thoughts_are_free(make: Callable[..., Engine]) -> None:
    end_of_thought = 65
    grammar = Grammar.choice(["yes", "no"], after=end_of_thought)
    bias = {end_of_thought: 6.0}
    for overlap in (True, False):
        params = SamplingParams(temperature=1.0, seed=4, max_tokens=100, grammar=grammar, logit_bias=bias)
        request = run(make(overlap=overlap), [params])[0]
        assert request.finish_reason == "stop"
        place = request.tokens.index(end_of_thought)
        assert place > 0
        assert TOKENIZER.decode(request.tokens[place + 1 : -1]) in ("yes", "no")


def test_a_slot_that_is_left_early_is_as_new(make: Callable[..., Engine]) -> None:
    """Its last step has been launched, and is sampled when somebody else is about to have the slot."""
    penalised = SamplingParams(temperature=0.0, max_tokens=30, repetition_penalty=1.5, presence_penalty=1.0)
    expected = run(make(overlap=True, max_batch=1), [penalised])[0].tokens
    engine = make(overlap=True, max_batch=1)
    first = engine.add(PROMPT, SamplingParams(max_tokens=30, grammar=Grammar("regex", "[ab]*")))
    for _ in range(4):
        engine.step()
    engine.finish(first)
    second = engine.add([*PROMPT, 0], penalised)
    while engine.busy:
        engine.step()
    assert second.tokens == expected


@pytest.mark.parametrize("overlap", [True, False])
def test_with_drafts_around(make: Callable[..., Engine], overlap: bool) -> None:
    wanted = [*WANTED[:4], SamplingParams(max_tokens=40)]
    expected = run(make(overlap=overlap), wanted)
    drafted = run(make(overlap=overlap, drafter=PromptLookup(3)), wanted)
    assert [request.tokens for request in drafted] == [request.tokens for request in expected]
    assert sum(request.drafted for request in drafted) > 0
    assert not any(request.drafted for request in drafted if request.params.grammar is not None)


def test_sampling_that_fails_leaves_nothing_behind(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=12, grammar=Grammar("regex", "[ab]*"))
    expected = run(make(overlap=True), [params])[0].tokens
    engine = make(overlap=True, max_batch=2, prefill_step_size=4)
    failing = engine.add(PROMPT, params)
    while len(failing.tokens) < 3:
        engine.step()
    waiting = [engine.add([*PROMPT, 0], params) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(DecodeStep, "sample", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        engine.step()
    assert "broken" in failing.error
    while engine.busy:
        engine.step()
    assert [request.tokens for request in waiting] == [expected] * 2


def test_batch_invariance(make: Callable[..., Engine]) -> None:
    alone = run(make(batch_invariant=True), [WANTED[3]])[0]
    others = [WANTED[0], WANTED[1], WANTED[5]]
    together = run(make(batch_invariant=True), [WANTED[3], *others])[0]
    assert alone.tokens == together.tokens


def test_where_there_are_no_grammars(make: Callable[..., Engine], model: CausalLM) -> None:
    params = SamplingParams(grammar=Grammar("json_object"))
    with pytest.raises(UserError, match="made without grammars"):
        make(grammars=None).add(PROMPT, params)
    with pytest.raises(UserError, match="does not go with a sampler or logits_processors"):
        list(stream_generate(model, TOKENIZER, PROMPT, sampler=lambda x: x.argmax(-1), grammar=params.grammar))
    with pytest.raises(UserError, match=r"regex: .*unclosed"):
        make().add(PROMPT, SamplingParams(grammar=Grammar("regex", "[a")))


def test_generate(model: CausalLM) -> None:
    grammar = Grammar("regex", "[0-9]{2}: [a-z]{3}")
    text = gfxlm.generate(model, TOKENIZER, "x", grammar=grammar, temperature=1.0, seed=1)
    assert re.fullmatch(grammar.text, text)
    stopped = gfxlm.generate(model, TOKENIZER, "x", grammar=grammar, temperature=1.0, seed=1, stop=": ")
    assert stopped == text[:2]
    cut = list(stream_generate(model, TOKENIZER, "x", max_tokens=2, grammar=grammar, temperature=1.0, seed=1))
    assert cut[-1].finish_reason == "length"
    assert text.startswith("".join(response.text for response in cut))
    answers = batch_generate(model, TOKENIZER, [[1, 2], [3]], grammar=grammar, temperature=1.0, seed=1)
    assert all(re.fullmatch(grammar.text, text) for text in answers.texts)


class EvenNumbers:
    """A grammar without llguidance: tokens go up, and are even."""

    error = None

    def __init__(self) -> None:
        self._last = 0

    def check(self, _: Grammar) -> None:
        pass

    def matcher(self, _: Grammar) -> "EvenNumbers":
        return EvenNumbers()

    def accept(self, token: int) -> None:
        self._last = token

    def masks(self, matchers: Sequence["EvenNumbers"]) -> Tensor:
        return torch.stack([matcher._mask() for matcher in matchers])

    def _mask(self) -> Tensor:
        flags = torch.zeros(6144, dtype=torch.int64)
        flags[self._last + 2 : self._last + 200 : 2] = 1
        words = (flags.view(-1, 32) << torch.arange(32)).sum(dim=1)
        return torch.where(words >= 2**31, words - 2**32, words).int()


class FailingBehind(EvenNumbers):
    """Raises instead of finding a mask, behind so many tokens as a grammar's text says."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._left = tokens

    def matcher(self, grammar: Grammar) -> "FailingBehind":
        return FailingBehind(int(grammar.text))

    def accept(self, token: int) -> None:
        super().accept(token)
        self._left -= 1

    def _mask(self) -> Tensor:
        if self._left == 0:
            raise ZeroDivisionError("injected")
        return super()._mask()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_mask_that_is_not_found_ends_one_request(make: Callable[..., Engine], overlap: bool, tokens: int) -> None:
    def requests(guilty: int) -> list[Request]:
        wanted = [SamplingParams(max_tokens=8, grammar=Grammar("regex", str(when))) for when in (99, guilty, 99)]
        return run(make(overlap=overlap, grammars=FailingBehind(99)), [*wanted, SamplingParams(max_tokens=8)])

    whole, failed = requests(99), requests(tokens)
    assert failed[1].error == "the grammar cannot go on: ZeroDivisionError: injected"
    assert failed[1].tokens == whole[1].tokens[:tokens]
    for number in (0, 2, 3):
        assert (failed[number].error, failed[number].tokens) == (None, whole[number].tokens)


def test_recordings_may_go_at_any_time(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [request.tokens for request in run(make(overlap=True), WANTED[:4])]
    step = Engine.step

    def forgetful(engine: Engine) -> list[Request]:
        engine._free_recordings()
        return step(engine)

    monkeypatch.setattr(Engine, "step", forgetful)
    assert [request.tokens for request in run(make(overlap=True), WANTED[:4])] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("drafts", [0, 3])
def test_recorded_steps_are_the_eager_ones(monkeypatch: pytest.MonkeyPatch, drafts: int) -> None:
    # In fp32: padded chunks and steps in other company round otherwise, which in bf16 decides between tokens.
    model, _ = gfxlm.load("builtin", device="cuda", dtype=torch.float32)
    wanted = [
        SamplingParams(temperature=1.0, seed=1, max_tokens=25, grammar=Grammar("json_object"), top_logprobs=5),
        SamplingParams(max_tokens=30, repetition_penalty=1.3),
        SamplingParams(max_tokens=20, grammar=Grammar("json_object"), repetition_penalty=1.3),
        SamplingParams(temperature=1.0, seed=4, max_tokens=12, top_p=0.9),
        SamplingParams(temperature=1.0, seed=4, max_tokens=12, top_p=0.9, grammar=Grammar("json_object")),
    ]

    def tokens(**options: Any) -> list[list[int]]:
        drafter = PromptLookup(drafts) if drafts else None
        engine = Engine(model, max_batch=3, max_context=64, grammars=EvenNumbers(), drafter=drafter, **options)
        return [request.tokens for request in run(engine, wanted)]

    recorded, waited = tokens(), tokens(overlap=False)
    monkeypatch.setenv("GFXLM_NO_GRAPH", "1")
    with pytest.warns(UserWarning, match="not captured"):
        eager = tokens()
    assert recorded == eager == waited
    for number in (0, 2, 4):
        assert all(a < b and b % 2 == 0 for a, b in zip(recorded[number][:-1], recorded[number][1:], strict=True))
