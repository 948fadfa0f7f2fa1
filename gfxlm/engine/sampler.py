"""From logits to tokens, for all rows of a step at once and without the host.

Each row looks up its own parameters by slot, in tensors that never move, so that a captured graph can hold
the whole of `Sampler.sample`. What the host does know, and may branch on, is which kinds of work any slot
wants: `Features`. The order of the work and the meaning of each part are mlx-lm's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.engine.logprobs import Draw, likeliest
from gfxlm.engine.masks import TokenMasks
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.random import gumbel, uniform
from gfxlm.errors import UserError
from gfxlm.kernels.layout import adjacent
from gfxlm.ops._common import on_gpu

MAX_BIASED_TOKENS = 1024
MAX_SPECIAL_TOKENS = 64
# Below this, dividing by the temperature magnifies nothing but fp32's rounding of a log probability.
MIN_TEMPERATURE = 1e-6


# Logits processors: (R, V) to (R, V).


def add_logit_bias(logits: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
    """Add `bias` (R, K) to the logits (R, V) of `tokens` (R, K); a bias of 0 is padding."""
    return logits.scatter_add(1, tokens, bias.to(logits.dtype))


def occurrences(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each token of the vocabulary stands in `tokens` (R, H): int32 (R, V). No other is counted."""
    bins = torch.where((tokens >= 0) & (tokens < vocab_size), tokens, vocab_size)
    counts = torch.zeros(len(tokens), vocab_size + 1, dtype=torch.int32, device=tokens.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.int32))[:, :vocab_size]


def penalise_repetition(logits: Tensor, counts: Tensor, penalty: Tensor | float) -> Tensor:
    """Make each token that has occurred less likely by a factor (Keskar et al., arXiv:1909.05858)."""
    return torch.where(counts > 0, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalise_presence(logits: Tensor, counts: Tensor, penalty: Tensor | float) -> Tensor:
    """Subtract the penalty once from each token that has occurred."""
    return torch.where(counts > 0, logits - penalty, logits)


def penalise_frequency(logits: Tensor, counts: Tensor, penalty: Tensor | float) -> Tensor:
    """Subtract the penalty from each token as often as it has occurred."""
    return torch.where(counts > 0, logits - counts * penalty, logits)


def ban(logits: Tensor, allowed: Tensor) -> Tensor:
    """-inf for each token of the logits (R, V) whose bit in `allowed`, int32 (R, ceil(V / 32)), is 0."""
    bits = 1 << torch.arange(32, dtype=torch.int32, device=logits.device)
    banned = (allowed[:, :, None] & bits == 0).view(len(logits), -1)  # (R, 32 ceil(V / 32))
    return logits.masked_fill(banned[:, : logits.shape[1]], -math.inf)


# Filters: log probabilities (R, W) in descending order, with -inf put where a token is dropped. A parameter
# is (R, 1). Equally likely tokens are kept or dropped together, so that the order of a sort decides nothing.


def _keep_first(logprobs: Tensor, count: Tensor) -> Tensor:
    threshold = logprobs.gather(1, count.clamp(1, logprobs.shape[1]) - 1)
    return logprobs.masked_fill(logprobs < threshold, -math.inf)


def keep_top_p(logprobs: Tensor, top_p: Tensor) -> Tensor:
    """Keep the likeliest tokens, up to the one that brings their sum to `top_p`; inf keeps all."""
    mass = logprobs.exp().cumsum(dim=1)
    mass_above = torch.nn.functional.pad(mass[:, :-1], (1, 0))
    return _keep_first(logprobs, (mass_above < top_p).sum(dim=1, keepdim=True))


def keep_min_p(logprobs: Tensor, log_min_p: Tensor, min_tokens_to_keep: Tensor) -> Tensor:
    """Keep what has at least exp(log_min_p) times the highest probability; -inf keeps all."""
    count = (logprobs >= logprobs[:, :1] + log_min_p).sum(dim=1, keepdim=True)
    return _keep_first(logprobs, count.maximum(min_tokens_to_keep))


def exclude_top_choices(
    logprobs: Tensor, threshold: Tensor, probability: Tensor, coin: Tensor, special: Tensor
) -> Tensor:
    """XTC: of the tokens likelier than `threshold`, drop all but the least likely.

    Rows whose `coin` is above `probability` stay as they are; `special` (R, W) marks tokens never dropped.
    """
    probs = torch.softmax(logprobs, dim=1)
    least = probs.masked_fill(probs <= threshold, math.inf).amin(dim=1, keepdim=True)
    return logprobs.masked_fill((probs > least) & ~special & (coin <= probability), -math.inf)


def keep_top_k(logprobs: Tensor, top_k: Tensor) -> Tensor:
    """Keep the `top_k` likeliest of the tokens that are left."""
    left = (logprobs > -math.inf).cumsum(dim=1)
    return _keep_first(logprobs, (left < top_k).sum(dim=1, keepdim=True) + 1)


@dataclass(frozen=True, slots=True)
class Features:
    """Which kinds of work at least one slot wants. Hashable: a captured graph is valid for one of these.

    `width` is how many of the likeliest tokens the filters look at, 0 where there is nothing to filter.
    """

    logit_bias: bool = False
    repetition: bool = False
    presence: bool = False
    frequency: bool = False
    sampling: bool = False
    top_p: bool = False
    min_p: bool = False
    xtc: bool = False
    top_k: bool = False
    logprobs: bool = False
    top_logprobs: bool = False
    grammar: bool = False
    width: int = 0

    @property
    def history(self) -> bool:
        """Whether a slot has to remember its tokens."""
        return self.repetition or self.presence or self.frequency

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> "Features":
        """The union over all slots."""
        sampling = [p for p in params if p.temperature >= MIN_TEMPERATURE]
        return cls(
            logit_bias=any(p.logit_bias for p in params),
            repetition=any(p.repetition_penalty not in (None, 0, 1) for p in params),
            presence=any(p.presence_penalty for p in params),
            frequency=any(p.frequency_penalty for p in params),
            sampling=bool(sampling),
            top_p=any(0 < p.top_p < 1 for p in sampling),
            min_p=any(p.min_p for p in sampling),
            xtc=any(p.xtc_probability for p in sampling),
            top_k=any(p.top_k for p in sampling),
            logprobs=any(p.logprobs for p in params),
            top_logprobs=any(p.top_logprobs is not None for p in params),
            grammar=any(p.grammar for p in params),
            width=_filter_width(sampling, vocab_size),
        )


def _filter_width(sampling: Sequence[SamplingParams], vocab_size: int) -> int:
    if not any(0 < p.top_p < 1 or p.min_p or p.xtc_probability or p.top_k for p in sampling):
        return 0
    # Every filter but XTC keeps a prefix, so what top_k will drop need not be sorted. The next power of two
    # leaves room for equals, and keeps the number of different widths small.
    if all(p.top_k and not p.xtc_probability for p in sampling):
        return min(1 << max(p.top_k for p in sampling).bit_length(), vocab_size)
    return vocab_size


def _fp32_columns(params: SamplingParams) -> dict[str, float]:
    """What the sampler keeps for a slot in fp32. Off is a value that changes no bit of the result.

    Kernels know the first three columns by their place, and so the first three of `_int64_columns`.
    """
    return {
        "temperature": params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0,
        "top_p": params.top_p if 0 < params.top_p < 1 else math.inf,
        "log_min_p": math.log(params.min_p) if params.min_p else -math.inf,
        "xtc_probability": params.xtc_probability,
        "xtc_threshold": params.xtc_threshold,
        "repetition_penalty": params.repetition_penalty or 1.0,
        "presence_penalty": params.presence_penalty or 0.0,
        "frequency_penalty": params.frequency_penalty or 0.0,
    }


def _int64_columns(params: SamplingParams) -> dict[str, int]:
    unlimited = 2**31
    seed = int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
    return {
        "seed": seed - 2**64 if seed >= 2**63 else seed,
        "top_k": params.top_k or unlimited,
        "min_tokens_to_keep": params.min_tokens_to_keep,
        "repetition_context_size": params.repetition_context_size,
        "presence_context_size": params.presence_context_size,
        "frequency_context_size": params.frequency_context_size,
    }


class Sampler:
    """Chooses the next token of every row. One slot holds one request's parameters and recent tokens.

    All state lies in tensors of fixed address; `sample` never reads one back. `max_context` is the longest
    penalty context, in tokens, that a request may ask for.
    """

    def __init__(
        self, n_slots: int, vocab_size: int, device: torch.device | str = "cpu", *, max_context: int = 1024
    ) -> None:
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.features = Features()
        self._params = [SamplingParams()] * n_slots
        fp32, int64 = _fp32_columns(self._params[0]), _int64_columns(self._params[0])
        self._fp32_names, self._int64_names = tuple(fp32), tuple(int64)
        self._fp32 = torch.tensor([list(fp32.values())] * n_slots, device=device)  # (S, 8)
        self._int64 = torch.tensor([list(int64.values())] * n_slots, device=device)  # (S, 6)
        self._bias_tokens = torch.zeros(n_slots, MAX_BIASED_TOKENS, dtype=torch.int64, device=device)
        self._bias = torch.zeros(n_slots, MAX_BIASED_TOKENS, device=device)
        self._special_tokens = torch.full((n_slots, MAX_SPECIAL_TOKENS), -1, device=device)
        self._allowed = TokenMasks(n_slots, vocab_size, device)
        self._history = torch.full((n_slots, max_context), -1, device=device)  # a ring per slot
        self._length = torch.zeros(n_slots, dtype=torch.int64, device=device)  # tokens ever pushed

    @property
    def graph_key(self) -> Features:
        """What a recording of `sample` is valid for."""
        return self.features

    @property
    def sequential(self) -> bool:
        """Whether a token depends on the ones before it."""
        return self.features.history

    def set(self, slot: int, params: SamplingParams, prompt_tokens: Sequence[int] = ()) -> None:
        """Give `slot` to a request. Raises UserError where it asks for more than the sampler holds."""
        self._check(params)
        previous, self._params[slot] = self._params[slot], params
        self.features = Features.of(self._params, self.vocab_size)
        _fill(self._fp32[slot], list(_fp32_columns(params).values()))
        _fill(self._int64[slot], list(_int64_columns(params).values()))
        wanted = Features.of([params], self.vocab_size)
        if wanted.logit_bias or previous.logit_bias:
            bias = params.logit_bias or {}
            _fill(self._bias_tokens[slot], list(bias))
            _fill(self._bias[slot], list(bias.values()))
        if wanted.grammar or previous.grammar:
            self._allowed.clear(slot)
        if wanted.xtc:
            _fill(self._special_tokens[slot], params.xtc_special_tokens, -1)
        if wanted.history:
            recent = prompt_tokens[-self.max_context :]
            _fill(self._history[slot], recent, -1)
            self._length[slot] = len(recent)

    def clear(self, slot: int) -> None:
        """Take `slot` back from its request, and with it what only that request wanted."""
        self.set(slot, SamplingParams())

    def allow(self, slots: Sequence[int], masks: Tensor) -> None:
        """Let only some tokens follow in slots whose requests have a grammar, from what is launched next on.

        `masks` are int32 (len(slots), ceil(V / 32)) in host memory, bit i of word j for token 32 j + i. Waits for
        nothing.
        """
        self._allowed.write(slots, masks)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Draw:
        """Choose one token a row, and remember it where a penalty needs that.

        `logits` are (R, V) of any float type. `slots`, int64 (R,), names a slot at most once, but for a
        scratch slot. `positions`, int64 (R,), key the random numbers: a request never repeats one.

        The token is -1 for a row whose logits hold a NaN or have no finite maximum. Log probabilities, where a
        slot wants them, are those after the logits processors, a grammar as the last one, and before the filters.
        Raises ValueError for logits of another vocabulary size.
        """
        if logits.ndim != 2 or logits.shape[1] != self.vocab_size:
            raise ValueError(f"logits must be (rows, {self.vocab_size}), but are {tuple(logits.shape)}")
        on = self.features
        logits = self._process(logits, slots)
        logprobs = None
        if on_gpu(logits) and not on.xtc and not on.logprobs:
            tokens = self._choose_by_kernels(logits, slots, positions)
        else:
            tokens, logprobs = self._choose(logits.float(), slots, positions)
        if on.history:
            length = self._length[slots]
            self._history[slots, length % self.max_context] = tokens
            self._length[slots] = length + 1
        top = likeliest(logits, tokens) if on.top_logprobs else None
        return Draw(tokens, logprobs if on.logprobs else None, top)

    def _choose(self, logits: Tensor, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens (R,), and the log probabilities (R, V) if they were needed."""
        on = self.features
        best, tokens = logits.max(dim=1)  # (R,), (R,)
        logprobs = torch.log_softmax(logits, dim=1) if on.sampling or on.logprobs else None
        if on.sampling and logprobs is not None:
            row = self._rows(slots)
            drawn = self._draw(logprobs, slots, positions, row)  # (R,)
            tokens = torch.where(row["temperature"][:, 0] > 0, drawn, tokens)
        return torch.where(best.isfinite(), tokens, -1), logprobs

    def _choose_by_kernels(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """The same tokens, but where fp32's rounding decides."""
        from gfxlm.kernels.basic.filters import draw_filtered
        from gfxlm.kernels.basic.sampling import draw
        from gfxlm.kernels.basic.select import select

        logits = adjacent(logits)
        if not self.features.sampling:
            return select(logits, finite=True)
        return (draw_filtered if self.features.width else draw)(logits, self._fp32, self._int64, slots, positions)

    def _check(self, params: SamplingParams) -> None:
        for kind in ("repetition", "presence", "frequency"):
            context = getattr(params, f"{kind}_context_size")
            if getattr(params, f"{kind}_penalty") and context > self.max_context:
                raise UserError(f"{kind}_context_size is {context}, but at most {self.max_context} here")
        named = {"logit_bias": params.logit_bias or {}, "xtc_special_tokens": params.xtc_special_tokens}
        for (name, tokens), limit in zip(named.items(), (MAX_BIASED_TOKENS, MAX_SPECIAL_TOKENS), strict=True):
            if len(tokens) > limit:
                raise UserError(f"{name} names {len(tokens)} tokens, but may name {limit} at most")
            if tokens and max(tokens) >= self.vocab_size:
                raise UserError(f"{name} names token {max(tokens)}, but the vocabulary has {self.vocab_size}")

    def _rows(self, slots: Tensor) -> dict[str, Tensor]:
        """Each row's parameters by name, (R, 1)."""
        fp32, int64 = self._fp32[slots], self._int64[slots]
        row = {name: fp32[:, i : i + 1] for i, name in enumerate(self._fp32_names)}
        return row | {name: int64[:, i : i + 1] for i, name in enumerate(self._int64_names)}

    def _process(self, logits: Tensor, slots: Tensor) -> Tensor:
        """The logits with biases and penalties, in fp32 where there are any, and without what a grammar bans."""
        on = self.features
        if on.logit_bias:
            logits = add_logit_bias(logits.float(), self._bias_tokens[slots], self._bias[slots])
        if on.history:
            logits = self._penalise(logits, slots)
        return ban(logits, self._allowed.bits[slots]) if on.grammar else logits

    def _penalise(self, logits: Tensor, slots: Tensor) -> Tensor:
        on = self.features
        logits, row = logits.float(), self._rows(slots)
        for kind, wanted, penalise in (
            ("repetition", on.repetition, penalise_repetition),
            ("presence", on.presence, penalise_presence),
            ("frequency", on.frequency, penalise_frequency),
        ):
            if wanted:
                recent = self._recent(slots, row[f"{kind}_context_size"])
                counts = occurrences(recent, self.vocab_size)
                logits = penalise(logits, counts, row[f"{kind}_penalty"])
        return logits

    def _recent(self, slots: Tensor, context_size: Tensor) -> Tensor:
        """The last `context_size` (R, 1) tokens of each row, in any order, -1 elsewhere: (R, max_context)."""
        length = self._length[slots, None]  # (R, 1)
        place = torch.arange(self.max_context, device=slots.device)
        age = (length - 1 - place) % self.max_context  # (R, H)
        return torch.where(age < context_size, self._history[slots], -1)

    def _draw(self, logprobs: Tensor, slots: Tensor, positions: Tensor, row: dict[str, Tensor]) -> Tensor:
        """A sample of each row's filtered distribution, (R,), by the Gumbel-max trick."""
        on = self.features
        seed = row["seed"][:, 0]
        tokens = torch.arange(self.vocab_size, device=logprobs.device)
        if on.width:
            logprobs, tokens = _likeliest(logprobs, on.width)  # (R, W), (R, W)
        if on.top_p:
            logprobs = keep_top_p(logprobs, row["top_p"])
        if on.min_p:
            logprobs = keep_min_p(logprobs, row["log_min_p"], row["min_tokens_to_keep"])
        if on.xtc:
            special = (occurrences(self._special_tokens[slots], self.vocab_size) > 0).gather(1, tokens)
            probability, coin = row["xtc_probability"], uniform(~seed, positions, 1)
            logprobs = exclude_top_choices(logprobs, row["xtc_threshold"], probability, coin, special)
        if on.top_k:
            logprobs = keep_top_k(logprobs, row["top_k"])
        temperature = torch.where(row["temperature"] > 0, row["temperature"], 1.0)
        # Noise belongs to a token, not to its rank: what other rows filter does not change this row's choice.
        choice = (logprobs / temperature + gumbel(seed, positions, tokens)).argmax(dim=1, keepdim=True)
        return tokens.expand_as(logprobs).gather(1, choice)[:, 0]


def _likeliest(logprobs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` highest log probabilities in descending order, and their tokens."""
    if width < logprobs.shape[1]:
        values, tokens = logprobs.topk(width, dim=1)
    else:
        values, tokens = logprobs.sort(dim=1, descending=True, stable=True)
    return values, tokens


def _fill(row: Tensor, values: Sequence[float], padding: int = 0) -> None:
    """Write `values` to the front of `row` and `padding` to the rest, in one copy from the host."""
    row.copy_(torch.tensor([*values, *[padding] * (len(row) - len(values))], dtype=row.dtype))
