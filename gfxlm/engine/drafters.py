"""Who guesses, for speculative decoding, how texts go on: an index of the text itself, or a smaller model."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Protocol

from torch import Tensor

from gfxlm.device.graph import Pool
from gfxlm.engine.budget import Budget, remaining
from gfxlm.engine.decode import DecodeStep, Sampled
from gfxlm.engine.logprobs import Draw
from gfxlm.engine.prefill import PrefillStep
from gfxlm.engine.request import TokenSampler
from gfxlm.engine.snapshots import Snapshots
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM

MAX_DRAFT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Target:
    """For whom a drafter drafts: a model, its sampler, and the slots of its cache. `pool` is for recordings."""

    model: CausalLM
    slots: int
    max_context: int
    sampler: TokenSampler
    most_rows: int
    pool: Pool | None = None


class Drafter(Protocol):
    """Guesses how the texts in the slots of one engine go on."""

    num_tokens: int

    def attach(self, target: Target) -> None:
        """Get ready, once and before everything else. Raises UserError where it cannot draft for such a model."""

    def warm_up(self) -> None:
        """Record what will be replayed."""

    def reset(self) -> None:
        """Free what recordings take. The device must be done with them."""

    def begin(self, slot: int, tokens: Sequence[int]) -> None:
        """A request takes a slot; its text so far."""

    def extend(self, slot: int, token: int) -> None:
        """The text of a slot has one more token."""

    def draft(self, most: Mapping[int, int]) -> Mapping[int, Sequence[int]]:
        """By slot, what may come next, up to so many tokens (1 or more) and up to `num_tokens`; or nothing."""

    def end(self, slot: int) -> None:
        """The request gives back its slot."""


def _check_num_tokens(name: str, count: int, least: int = 1) -> int:
    if not least <= count <= MAX_DRAFT_TOKENS:
        raise UserError(f"{name} must be from {least} to {MAX_DRAFT_TOKENS}, but is {count}")
    return count


class PromptLookup:
    """Drafts what followed the last time: the text behind the latest earlier place where its last tokens occurred.

    The last `max_ngram` tokens are looked up, then fewer, down to `min_ngram`: a single token has nearly always
    occurred before, and what followed then is rarely right. Costs no pass of another model and no memory to speak of;
    it pays where answers repeat what is there already: edited code, quotations, tables.
    """

    def __init__(self, num_tokens: int = 10, *, max_ngram: int = 3, min_ngram: int = 2) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise UserError(f"n-grams must have 1 token or more, not from {min_ngram} to {max_ngram}")
        self.num_tokens = _check_num_tokens("num_tokens", num_tokens)
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._texts: dict[int, _IndexedText] = {}

    def attach(self, target: Target) -> None:
        """Any model will do."""

    def warm_up(self) -> None:
        """There is nothing to record."""

    def reset(self) -> None:
        """Nor to free."""

    def begin(self, slot: int, tokens: Sequence[int]) -> None:
        """Index a text, in time and memory linear in its length."""
        self._texts[slot] = _IndexedText(self._sizes)
        for token in tokens:
            self._texts[slot].add(token)

    def extend(self, slot: int, token: int) -> None:
        """Index one more token."""
        self._texts[slot].add(token)

    def draft(self, most: Mapping[int, int]) -> dict[int, list[int]]:
        """What followed the latest earlier occurrence, as far as it goes, and then itself over and over."""
        return {slot: self._texts[slot].continuation(min(count, self.num_tokens)) for slot, count in most.items()}

    def end(self, slot: int) -> None:
        """Forget the text."""
        del self._texts[slot]


class _IndexedText:
    """Tokens, and where each n-gram among them last was."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # by n-gram, the place right after its latest one

    def add(self, token: int) -> None:
        # The last n-grams are entered only now that something follows them: a look-up is not to find itself.
        for gram in self._last_grams():
            self._followed[gram] = len(self._tokens)
        self._tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        place = next((self._followed[gram] for gram in self._last_grams() if gram in self._followed), None)
        if place is None:
            return []
        tail = self._tokens[place : place + count]
        return [tail[i % len(tail)] for i in range(count)]

    def _last_grams(self) -> Iterable[tuple[int, ...]]:
        return (tuple(self._tokens[-size:]) for size in self._sizes if size <= len(self._tokens))


class DraftModel:
    """Drafts with a second, smaller model of the same vocabulary, over a cache of its own.

    It samples as the first one does and with the same random numbers, so that both choose the same wherever they
    agree; where a token's choice depends on the ones before it, it drafts its likeliest tokens.
    """

    def __init__(self, model: CausalLM, num_tokens: int = 3) -> None:
        self.model = model
        self.num_tokens = _check_num_tokens("num_tokens", num_tokens)
        self._texts: dict[int, list[int]] = {}

    def attach(self, target: Target) -> None:
        """Make room for as many texts. UserError for a model of another vocabulary, or on another device."""
        ours, theirs = self.model.config, target.model.config
        if ours.vocab_size != theirs.vocab_size:
            raise UserError(
                f"the draft model has a vocabulary of {ours.vocab_size} tokens, the model one of {theirs.vocab_size}"
            )
        if self.model.device != target.model.device:
            raise UserError(f"the draft model is on {self.model.device}, the model on {target.model.device}")
        context = min(target.max_context, ours.max_position_embeddings, self.model.model.rope.limit or 1 << 62)
        self._cache = self.model.make_cache(target.slots, context)
        self._rows = target.most_rows
        self._prefill_step = PrefillStep(self.model, self._cache, self._rows, target.pool, small=True)
        self._decode_step = DecodeStep(self.model, self._cache, _Guess(target.sampler), target.pool)
        self._snapshots = Snapshots(self._cache)

    def warm_up(self) -> None:
        """Record its prompts' chunks and its decode steps."""
        self._prefill_step.warm_up()
        self._decode_step.warm_up()

    def reset(self) -> None:
        """Free what the recordings of both take."""
        self._prefill_step.reset()
        self._decode_step.reset()

    def begin(self, slot: int, tokens: Sequence[int]) -> None:
        """Keep the text until it is asked for."""
        self._texts[slot] = list(tokens)
        self._cache.lengths[slot] = 0

    def extend(self, slot: int, token: int) -> None:
        """Keep one more token until it is asked for."""
        self._texts[slot].append(token)

    def end(self, slot: int) -> None:
        """Forget the text."""
        del self._texts[slot]

    def draft(self, most: Mapping[int, int]) -> dict[int, list[int]]:
        """Read what is new in the texts, then guess. What it reads of its own guesses it forgets again."""
        counts = {slot: self._fitting(slot, count) for slot, count in most.items()}
        slots = [slot for slot, count in counts.items() if count > 0]
        if not slots:
            return {}
        hidden, positions, _ = self._read(slots)
        known = {slot: self._cache.lengths[slot] for slot in slots}
        steps = [(slots, self._decode_step.begin(slots, hidden, positions))]
        further = ([slot for slot in slots if counts[slot] > done] for done in range(1, max(counts.values())))
        steps += [(those, self._step(those)) for those in further]
        guesses: dict[int, list[int]] = {slot: [] for slot in slots}
        for those, sampled in steps:
            for slot, token in zip(those, sampled.read().tokens.tolist(), strict=True):
                guesses[slot].append(token)
        for slot in slots:
            self._snapshots.put_back(slot)
            self._cache.lengths[slot] = known[slot]
        # From logits that are not finite no token comes.
        return {slot: list(takewhile(lambda token: token >= 0, tokens)) for slot, tokens in guesses.items()}

    def _fitting(self, slot: int, count: int) -> int:
        """How many tokens it may guess: the last guess is not read, the whole text and the others are."""
        return min(count, self.num_tokens, self._cache.max_context - len(self._texts[slot]) + 1)

    def _read(self, slots: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Feed the texts as far as they are not known; hidden states, positions and slots of their last tokens."""
        chunk = max(1, self._rows // len(slots))
        pending = [self._texts[slot][self._cache.lengths[slot] :] for slot in slots]
        for number, slot in enumerate(slots):
            while len(pending[number]) > chunk:
                self._prefill_step.run(pending[number][:chunk], [slot], [chunk])
                pending[number] = pending[number][chunk:]
        fed = self._prefill_step.run(
            [token for text in pending for token in text], slots, [len(text) for text in pending]
        )
        for slot in slots:
            self._snapshots.save(slot)
        return fed.at([span.stop - 1 for span in fed.spans])

    def _step(self, slots: Sequence[int]) -> Sampled:
        sampled = self._decode_step.run(slots)
        for slot in slots:
            self._cache.lengths[slot] += 1
        return sampled


def drafter_for(draft_model: CausalLM | None, num_draft_tokens: int, prompt_lookup_num_tokens: int) -> Drafter | None:
    """What these options ask for, None for no drafts. UserError as `check_options` raises it."""
    check_options(draft_model is not None, num_draft_tokens, prompt_lookup_num_tokens)
    if draft_model is not None:
        return DraftModel(draft_model, num_draft_tokens)
    return PromptLookup(prompt_lookup_num_tokens) if prompt_lookup_num_tokens else None


def remaining_with(drafter: Drafter | None, model: CausalLM, *, slots: int = 1, prefill_step_size: int) -> Budget:
    """What `remaining` says of a model that is loaded, with drafts if there are to be any.

    Then recurrent states are kept twice, and a draft model that is loaded has caches too.
    """
    budget = remaining(model, slots=slots, prefill_step_size=prefill_step_size)
    if drafter is None:
        return budget
    budget = replace(budget, state=2 * budget.state)
    if not isinstance(drafter, DraftModel):
        return budget
    own = remaining(drafter.model, slots=slots, prefill_step_size=prefill_step_size)
    return replace(
        budget,
        workspace=budget.workspace + own.workspace,
        state=budget.state + 2 * own.state,
        position=budget.position + own.position,
        quantized={bits: position + own.position for bits, position in budget.quantized.items()},
    )


def check_options(draft_model: bool, num_draft_tokens: int, prompt_lookup_num_tokens: int) -> None:
    """Raise UserError for drafts of both kinds, and for numbers out of range."""
    if draft_model and prompt_lookup_num_tokens:
        raise UserError("drafts come from a draft_model or from prompt_lookup_num_tokens, not from both")
    _check_num_tokens("num_draft_tokens", num_draft_tokens, 1)
    _check_num_tokens("prompt_lookup_num_tokens", prompt_lookup_num_tokens, 0)


@dataclass(frozen=True, slots=True)
class _Guess:
    """Samples a draft as the engine's own sampler would, or greedily where that one must not be asked twice."""

    sampler: TokenSampler

    @property
    def graph_key(self) -> Hashable:
        """What a recording of `sample` is valid for."""
        return "greedy" if self.sampler.sequential else self.sampler.graph_key

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Draw:
        """One token a row; nobody wants the log probabilities of a draft."""
        if self.sampler.sequential:
            return Draw(logits.argmax(-1))
        return Draw(self.sampler.sample(logits, slots, positions).tokens)
