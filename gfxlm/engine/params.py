"""What one request asks of the sampler, checked once, in host numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.engine.grammar import Grammar

MAX_TOP_LOGPROBS = 20
_FROM_GENERATION_CONFIG = ("top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose a request's tokens, and when to stop. Raises UserError for a value out of range.

    The names, defaults and meaning are mlx-lm's. Off is: `temperature` 0 (greedy, and no filter counts),
    `top_p` 0 or 1, `top_k` 0, `min_p` 0, `xtc_probability` 0, a penalty of None or 0. `max_tokens` -1 means
    no limit. `seed` None draws one from torch's CPU generator. `logprobs` asks the sampler for all of them, on the
    device; `top_logprobs` for the chosen token's and for those of so many of the likeliest ones, 0 to 20, on the host.
    A `grammar` says what the text has to look like.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: Sequence[int] = ()
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    seed: int | None = None
    max_tokens: int = 256
    stop: str | Sequence[str] = ()
    logprobs: bool = False
    top_logprobs: int | None = None
    grammar: "Grammar | None" = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0)
        for name in ("top_p", "min_p", "xtc_probability"):
            _check_number(name, getattr(self, name), 0.0, 1.0)
        _check_number("xtc_threshold", self.xtc_threshold, 0.0, 0.5)
        _check_integer("top_k", self.top_k, 0)
        _check_integer("min_tokens_to_keep", self.min_tokens_to_keep, 1)
        for kind, low in (("repetition", 0.0), ("presence", -math.inf), ("frequency", -math.inf)):
            if (penalty := getattr(self, f"{kind}_penalty")) is not None:
                _check_number(f"{kind}_penalty", penalty, low)
            _check_integer(f"{kind}_context_size", getattr(self, f"{kind}_context_size"), 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens != -1:
            _check_integer("max_tokens", self.max_tokens, 1)
        if self.top_logprobs is not None:
            _check_integer("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "xtc_special_tokens", tuple(self.xtc_special_tokens))
        for token in self.xtc_special_tokens:
            _check_integer("xtc_special_tokens", token, 0)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """A model's own defaults, from its generation_config.json; an override that is not None wins.

        Without `do_sample: true` the model is greedy, whatever temperature the file names.
        """
        values: dict[str, Any] = {
            name: config[name] for name in _FROM_GENERATION_CONFIG if config.get(name) is not None
        }
        if config.get("do_sample"):
            temperature = config.get("temperature")
            values["temperature"] = 1.0 if temperature is None else temperature
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls(**values)


def _check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    if isinstance(value, int | float) and math.isfinite(value) and low <= value <= high:
        return
    if low == -math.inf:
        wanted = "a finite number"
    else:
        wanted = f"a number of at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
    raise UserError(f"{name} must be {wanted}, but is {value!r}")


def _check_integer(name: str, value: object, low: int, high: float = math.inf) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return
    wanted = f"an integer of at least {low}" if high == math.inf else f"an integer from {low} to {high}"
    raise UserError(f"{name} must be {wanted}, but is {value!r}")


def _checked_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise UserError(f"stop must be strings that are not empty, but holds {string!r}")
    return strings


def _checked_bias(logit_bias: Mapping[int, float]) -> dict[int, float]:
    for token, bias in logit_bias.items():
        _check_integer("logit_bias token", token, 0)
        # -inf is of use, it bans a token; +inf would leave no finite log probability.
        if bias != -math.inf:
            _check_number(f"logit_bias[{token}]", bias, -math.inf)
    return dict(logit_bias)
