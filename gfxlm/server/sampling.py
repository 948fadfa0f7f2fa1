"""What every route that generates text can be asked about its tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, StrictBool

from gfxlm.engine.grammar import Grammar
from gfxlm.engine.params import SamplingParams
from gfxlm.errors import UserError
from gfxlm.server.errors import invalid
from gfxlm.server.fields import Body
from gfxlm.server.settings import Settings

if TYPE_CHECKING:
    from gfxlm.engine.tokenizer import Tokenizer
    from gfxlm.server.generation import Generation
    from gfxlm.server.worker import Worker

_OFF = -1  # of top_k, in vLLM's words
# As `SamplingParams` names them; the rest needs a word said about it.
_PLAIN = (
    "temperature",
    "top_p",
    "min_p",
    "min_tokens_to_keep",
    "xtc_probability",
    "xtc_threshold",
    "repetition_penalty",
    "repetition_context_size",
    "presence_penalty",
    "presence_context_size",
    "frequency_penalty",
    "frequency_context_size",
    "seed",
)


class SamplingFields(Body):
    """How to choose tokens: OpenAI's names, and mlx-lm's, llama.cpp's and vLLM's for the rest."""

    max_tokens: int | None = Field(None, ge=1, description="Tokens to generate at most.")
    temperature: float | None = Field(None, ge=0, description="0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=_OFF, description="Keep this many tokens; 0 and -1 keep all.")
    min_p: float | None = Field(None, ge=0, le=1)
    min_tokens_to_keep: int | None = Field(None, ge=1)
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=0.5)
    repetition_penalty: float | None = Field(None, ge=0)
    repetition_context_size: int | None = Field(None, ge=1)
    presence_penalty: float | None = None
    presence_context_size: int | None = Field(None, ge=1)
    frequency_penalty: float | None = None
    frequency_context_size: int | None = Field(None, ge=1)
    logit_bias: dict[int, float] | None = Field(None, description="Added to the scores of token ids.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(None, description="The text ends before any of these.")
    min_tokens: int = Field(0, ge=0, description="Neither end-of-text tokens nor stop strings end it before so many.")
    ignore_eos: StrictBool = Field(False, description="Go on to max_tokens.")
    timeout: float | None = Field(None, gt=0, description="Seconds until the request is given up.")

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most, where the request says it."""
        return self.max_tokens

    def params(
        self,
        worker: "Worker",
        settings: Settings,
        *,
        top_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """The request's parameters: its own, else the server's defaults, else the model's. ApiError 400 if bad."""
        given: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        given["top_k"] = 0 if self.top_k == _OFF else self.top_k
        given["max_tokens"] = limit = self.limit or settings.max_tokens
        if self.min_tokens > limit:
            raise invalid(f"min_tokens: {self.min_tokens} are more than max_tokens, {limit}", param="min_tokens")
        endless = self.ignore_eos or self.min_tokens == limit
        given["stop"] = self.stop
        given["logit_bias"] = self._bias(worker, endless)
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return SamplingParams.from_generation_config(
                worker.generation_config,
                **{**settings.sampling, **given},
                xtc_special_tokens=_special(worker.tokenizer) if given.get("xtc_probability") else (),
                top_logprobs=top_logprobs,
                grammar=self._grammar(worker, grammar, endless),
            )
        except UserError as error:
            raise invalid(str(error), param=str(error).split(maxsplit=1)[0]) from error

    def start(
        self, worker: "Worker", settings: Settings, prompt: Sequence[int], params: SamplingParams, n: int
    ) -> "list[Generation]":
        """Queue `n` texts of a prompt, text i with `seed` + i. Raises ApiError as `Worker.generate` does."""
        if n > settings.capacity:
            raise invalid(f"n: at most {settings.capacity} texts run or wait here at the same time", param="n")
        timeout = min((limit for limit in (self.timeout, settings.request_timeout) if limit is not None), default=None)
        generations = []
        for i in range(n):
            one = params if params.seed is None else replace(params, seed=params.seed + i)
            generations.append(worker.generate(prompt, one, timeout=timeout, min_tokens=self.min_tokens))
        return generations

    def _bias(self, worker: "Worker", endless: bool) -> dict[int, float] | None:
        bias = dict(self.logit_bias or {})
        for token in bias:
            if not 0 <= token < worker.vocab_size:
                raise invalid(
                    f"logit_bias: {token} is no token, the vocabulary has {worker.vocab_size}", param="logit_bias"
                )
        if endless:
            bias |= dict.fromkeys(worker.tokenizer.eos_token_ids, float("-inf"))
        return bias or None

    def _grammar(self, worker: "Worker", given: Grammar | None, endless: bool) -> Grammar | None:
        """The one given, or one of any tokens, the first `min_tokens` of which do not end the text."""
        if not self.min_tokens:
            return given
        if given is not None:
            raise invalid(
                "min_tokens: does not go with structured output, nor with tools that are strict or must be called: "
                "the structure says where the text can end",
                param="min_tokens",
            )
        ends = worker.tokenizer.eos_token_ids
        if endless or not ends:
            return None
        token = f"<[^{','.join(map(str, sorted(ends)))}]>"
        return Grammar("lark", f"start: {token}{{{self.min_tokens}}} {token}*")


def _special(tokenizer: "Tokenizer") -> list[int]:
    """What XTC must not drop."""
    return [*tokenizer.encode("\n", add_special_tokens=False), *tokenizer.eos_token_ids]
