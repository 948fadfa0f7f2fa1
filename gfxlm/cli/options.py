"""Options that several commands share, as groups that become single parameters on the command line."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from gfxlm.cli.progress import progress_bar
from gfxlm.cli.text import read_text
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.engine.prompt_cache import PromptFile
    from gfxlm.engine.tokenizer import Tokenizer
    from gfxlm.models.base import CausalLM


class DType(StrEnum):
    """The float types that a model can run in."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of options: typer sees their fields, the command gets the dataclasses."""
    groups: dict[str, Any] = {}
    parameters = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += _parameters(hints[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    def run(**values: Any) -> None:
        for name, group in groups.items():
            members = {field.name: values.pop(field.name) for field in fields(group)}
            values[name] = group(**members)
        command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]


MODEL_PANEL = {"rich_help_panel": "Model"}
_SAMPLING = {"rich_help_panel": "Sampling (by default as the model's generation_config.json says)"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Annotated[
        str | None,
        typer.Option("--model", help="A model folder or a hub name. Default: the built-in model.", **MODEL_PANEL),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", **MODEL_PANEL)] = None
    dtype: Annotated[
        DType | None, typer.Option(help="Type of activations and scales. Default: the checkpoint's.", **MODEL_PANEL)
    ] = None
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda (ROCm too), cuda:1. Default: a GPU if there is one.", **MODEL_PANEL)
    ] = None
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Memory that weights and caches may take: 24GB, 24GiB, 80%. Default: what is free.",
            metavar="AMOUNT",
            **MODEL_PANEL,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the tokenizer's own Python code.", **MODEL_PANEL)
    ] = False
    no_self_test: Annotated[
        bool, typer.Option("--no-self-test", help="Go on with a GPU that was not seen to compute right.", **MODEL_PANEL)
    ] = False

    @property
    def path(self) -> str:
        """The folder or hub name, "builtin" where none was given."""
        from gfxlm.engine.load import BUILT_IN

        return self.model or BUILT_IN

    def load(self, *, max_context: int | None = None, kv: dict[str, Any] | None = None) -> "tuple[CausalLM, Tokenizer]":
        """Load the model and its tokenizer, under a progress bar; before, see that such a context will fit."""
        import torch

        from gfxlm.engine.load import load
        from gfxlm.models.cache import KVOptions

        with progress_bar("loading", in_bytes=True) as progress:
            return load(
                self.path,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                dtype=getattr(torch, self.dtype) if self.dtype else None,
                device=self.device,
                memory_limit=self.memory_limit,
                self_test=not self.no_self_test,
                max_context=max_context,
                kv=KVOptions(**(kv or {})),
                progress=progress,
            )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen, and what ends a text. What is not given is left to the model."""

    temp: Annotated[
        float | None, typer.Option("--temp", "--temperature", help="Temperature; 0 is greedy.", **_SAMPLING)
    ] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this mass.", **_SAMPLING)] = None
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest one.", **_SAMPLING)
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Keep this many tokens; 0 keeps all.", **_SAMPLING)] = None
    min_tokens_to_keep: Annotated[
        int | None, typer.Option(help="Tokens that min-p never drops. Default: 1.", **_SAMPLING)
    ] = None
    xtc_probability: Annotated[
        float | None, typer.Option(help="How often XTC drops the likeliest tokens. Default: 0.", **_SAMPLING)
    ] = None
    xtc_threshold: Annotated[
        float | None, typer.Option(help="Tokens likelier than this are XTC's. Default: 0.1.", **_SAMPLING)
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Divide the scores of recent tokens by this.", **_SAMPLING)
    ] = None
    repetition_context_size: Annotated[
        int | None,
        typer.Option(help="How many tokens are recent to the repetition penalty. Default: 20.", **_SAMPLING),
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtract this from the scores of recent tokens.", **_SAMPLING)
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Subtract this for each time a token occurred of late.", **_SAMPLING)
    ] = None
    logit_bias: Annotated[
        str | None, typer.Option(help='Added to scores: {"token id": bias}.', metavar="JSON", **_SAMPLING)
    ] = None
    seed: Annotated[int | None, typer.Option(help="Makes the random choices repeatable.", **_SAMPLING)] = None
    stop: Annotated[
        list[str] | None, typer.Option(help="End the text before this string; may be given again.", **_SAMPLING)
    ] = None
    extra_eos_token: Annotated[
        list[str] | None, typer.Option(help="A token that ends the text too; may be given again.", **_SAMPLING)
    ] = None

    def params(self, max_tokens: int) -> dict[str, Any]:
        """The options as fields of `SamplingParams`. Raises UserError for a value out of range, before any loading."""
        from gfxlm.engine.params import SamplingParams

        given: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": self.temp,
            "logit_bias": _logit_bias(self.logit_bias) if self.logit_bias else None,
            "stop": [unescaped(string) for string in self.stop] if self.stop else None,
        }
        for name in SamplingParams.__dataclass_fields__:
            if name not in given and hasattr(self, name):
                given[name] = getattr(self, name)
        given = {name: value for name, value in given.items() if value is not None}
        SamplingParams(**given)
        return given

    def prepare(self, params: dict[str, Any], tokenizer: "Tokenizer") -> dict[str, Any]:
        """Tell the tokenizer of further end tokens; the parameters, with the tokens that XTC must not drop."""
        for token in self.extra_eos_token or ():
            tokenizer.add_eos_token(token)
        if not self.xtc_probability:
            return params
        return params | {"xtc_special_tokens": [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]}


_SPECULATION = {"rich_help_panel": "Speculative decoding: the same text, in fewer passes of the model"}


@dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    """Who guesses tokens ahead of the model."""

    draft_model: Annotated[
        str | None,
        typer.Option(help="A smaller model with the same tokenizer: a folder or a hub name.", **_SPECULATION),
    ] = None
    num_draft_tokens: Annotated[int, typer.Option(help="Tokens that it guesses at a time.", **_SPECULATION)] = 3
    prompt_lookup_num_tokens: Annotated[
        int,
        typer.Option(help="Guess so many tokens to go on as after their last occurrence; 0 is off.", **_SPECULATION),
    ] = 0

    def check(self, max_kv_size: int | None) -> None:
        """Raise UserError for a bad value, before any loading, and for drafts over a cache that forgets."""
        from gfxlm.engine.drafters import check_options

        if max_kv_size is not None and (self.draft_model is not None or self.prompt_lookup_num_tokens):
            raise UserError(
                "--max-kv-size: a cache that forgets cannot take back drafts; "
                "it does not go with --draft-model and --prompt-lookup-num-tokens"
            )
        check_options(self.draft_model is not None, self.num_draft_tokens, self.prompt_lookup_num_tokens)

    def params(self, model: ModelOptions, tokenizer: "Tokenizer") -> dict[str, Any]:
        """As `stream_generate` names them; loads the draft model. UserError if that has another tokenizer."""
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(SpeculationOptions)}
        if self.draft_model is None:
            return given
        lm, its_tokenizer = replace(model, model=self.draft_model, revision=None).load()
        theirs = its_tokenizer.get_vocab()
        if any(theirs.get(token, number) != number for token, number in tokenizer.get_vocab().items()):
            raise UserError(f"--draft-model: {self.draft_model} has another tokenizer than {model.path}")
        return given | {"draft_model": lm}


_GRAMMAR = {"rich_help_panel": "Structured output: the text has to look like this, from its first token on"}


@dataclass(frozen=True, kw_only=True)
class GrammarOptions:
    """What the answer has to look like; at most one of them."""

    json_schema: Annotated[
        str | None, typer.Option(help="JSON that this schema describes.", metavar="FILE|JSON", **_GRAMMAR)
    ] = None
    regex: Annotated[str | None, typer.Option(help="What this expression matches as a whole.", **_GRAMMAR)] = None
    grammar: Annotated[
        str | None, typer.Option(help="What this grammar, in llguidance's Lark, describes.", metavar="FILE", **_GRAMMAR)
    ] = None

    def params(self) -> dict[str, Any]:
        """As a field of `SamplingParams`. Raises UserError for two at once and for a bad file, before any loading."""
        from gfxlm.engine.grammar import Grammar

        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join('--' + name.replace('_', '-') for name in given)}: give one of them")
        if self.json_schema is not None:
            schema = self.json_schema
            schema = schema if schema.lstrip().startswith("{") else read_text(schema)
            json_object("--json-schema", schema)
            return {"grammar": Grammar("json_schema", schema)}
        if self.regex is not None:
            return {"grammar": Grammar("regex", self.regex)}
        if self.grammar is not None:
            return {"grammar": Grammar("lark", read_text(self.grammar))}
        return {}


_CACHE = {"rich_help_panel": "Cache of keys and values"}


@dataclass(frozen=True, kw_only=True)
class KVCacheOptions:
    """How many keys and values are kept, and whether they are quantised."""

    max_kv_size: Annotated[
        int | None,
        typer.Option(
            help="Keep so many: those of a text's first 4 tokens and of its newest ones; the text goes on. "
            "Default: all of them.",
            **_CACHE,
        ),
    ] = None
    kv_bits: Annotated[
        int | None, typer.Option(help="Quantise keys and values to 8 or 4 bits. Default: not at all.", **_CACHE)
    ] = None
    kv_group_size: Annotated[int, typer.Option(help="How many of them share a scale: 32, 64 or 128.", **_CACHE)] = 64
    quantized_kv_start: Annotated[
        int,
        typer.Option(
            help="--kv-bits is for a context that may grow beyond so many tokens, which is then quantised from its "
            "first token on; a smaller one is not quantised at all.",
            **_CACHE,
        ),
    ] = 5000

    def params(self) -> dict[str, Any]:
        """As `KVOptions` and `stream_generate` name them. Raises UserError for a bad value, before any loading."""
        from gfxlm.models.cache import KVOptions

        given = {field.name: getattr(self, field.name) for field in fields(KVCacheOptions)}
        KVOptions(**given)
        return given


@dataclass(frozen=True, kw_only=True)
class PromptCacheOptions:
    """Where a prompt comes from that the model has read already."""

    prompt_cache_file: Annotated[
        str | None,
        typer.Option(
            help="Go on from the prompt that `gfxlm cache-prompt` put into this file, with the model that read it.",
            metavar="FILE",
            **_CACHE,
        ),
    ] = None

    def open(self, model: ModelOptions, system_prompt: str | None) -> "tuple[ModelOptions, PromptFile | None]":
        """The file, and the model it was made with where no other is named. UserError for a second system prompt."""
        if self.prompt_cache_file is None:
            return model, None
        from gfxlm.engine.prompt_cache import PromptFile

        file = PromptFile.open(self.prompt_cache_file)
        if system_prompt is not None:
            raise UserError("--system-prompt: comes before what is in --prompt-cache-file; give it to cache-prompt")
        return replace(model, model=model.model or file.model), file


def unescaped(text: str) -> str:
    r"""Text from the command line with `\n` and `\t` turned into what they stand for, as mlx-lm does."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def json_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object that an option holds. Raises UserError naming the option."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{option}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{option}: expected a JSON object, but got {text}")
    return value


def _logit_bias(text: str) -> dict[int, float]:
    entries = json_object("--logit-bias", text)
    for token in entries:
        if not token.isdecimal():
            raise UserError(f"--logit-bias: {token!r} is no token id")
    return {int(token): bias for token, bias in entries.items()}
