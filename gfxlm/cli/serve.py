"""`gfxlm serve`: OpenAI's HTTP interface, for many users."""

import os
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gfxlm.cli.options import MODEL_PANEL, KVCacheOptions, ModelOptions, grouped, json_object
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.server.opening import Opening
    from gfxlm.server.registry import ModelSpec
    from gfxlm.server.settings import Settings

_HTTP = {"rich_help_panel": "HTTP"}
_LIMITS = {"rich_help_panel": "Limits"}
_DEFAULTS = {"rich_help_panel": "What a request gets that does not say (by default as the model's files say)"}

_CACHED = "the prefix cache has what memory there is; --no-prefix-cache turns it off"
_TEMPLATE = "the model's own template is used, and without one messages are joined as they are"
_DRAFTS = "there is no speculative decoding for many users at a time; gfxlm generate and chat have it"
_INSTEAD = {
    "prompt_concurrency": "prompts share the tokens of a step, --prefill-step-size",
    "prompt_cache_size": _CACHED,
    "prompt_cache_bytes": _CACHED,
    "adapter_path": "adapters are not supported; fuse the adapter into the model first",
    "draft_model": _DRAFTS,
    "num_draft_tokens": _DRAFTS,
    "chat_template": _TEMPLATE,
    "use_default_chat_template": _TEMPLATE,
    "pipeline": "a model runs on one device",
}
# As browsers send it: no path, not even a slash.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")
_Hidden = Annotated[str | None, typer.Option(hidden=True)]
_HiddenFlag = Annotated[bool, typer.Option(hidden=True)]


class LogLevel(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How it is logged."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, kw_only=True)
class ServedModels(ModelOptions):
    """Which models, and how they are loaded."""

    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A model folder or a hub name; may be given again: requests name the one they want. "
            "Default: the built-in model.",
            **MODEL_PANEL,
        ),
    ] = None  # type: ignore[assignment]
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What requests call it; once for each --model. Default: as given.", **MODEL_PANEL),
    ] = None
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Instead: random 4-bit weights in the shapes of qwen3-8b, qwen3-30b-a3b, qwen3-coder-next, or a "
            "config.json, to measure a model's speed before it is downloaded.",
            **MODEL_PANEL,
        ),
    ] = None

    @property
    def paths(self) -> list[str]:
        """Folders and hub names."""
        from gfxlm.engine.load import BUILT_IN

        return list(self.model or [BUILT_IN])

    def check(self) -> None:
        """Raise UserError for models or names that do not go together, and for a checkpoint that is missing."""
        from gfxlm.engine.load import open_checkpoint

        names = self.served_model_name or []
        if self.synthetic:
            if self.model or names:
                raise UserError("--synthetic: is served alone, under its own name; not with --model")
            return
        if len(set(self.paths)) < len(self.paths) or len(set(names)) < len(names):
            raise UserError("--model, --served-model-name: the same one is given twice")
        if len(names) > len(self.paths):
            raise UserError(f"--served-model-name: there are {len(names)}, but {len(self.paths)} of --model")
        if not all(names):
            raise UserError("--served-model-name: is empty")
        for path in self.paths:
            open_checkpoint(path, self.revision)

    def specs(self, opening: "Opening") -> "tuple[list[ModelSpec], int]":
        """What is served, and how many of them can be in memory at a time."""
        if self.synthetic:
            return [opening.synthetic(self.synthetic)], 1
        residency = opening.residency(self.paths)
        specs = opening.specs(self.paths, self.served_model_name or [], residency)
        return specs, 1 if residency is None else len(specs)

    def arguments(self) -> dict[str, Any]:
        """What `gfxlm.load` is told besides."""
        import torch

        return {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "dtype": getattr(torch, self.dtype) if self.dtype else None,
            "device": self.device,
            "memory_limit": self.memory_limit,
            "self_test": not self.no_self_test,
        }


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Where it listens, and to whom."""

    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.", **_HTTP)] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.", **_HTTP)] = 8080
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="A key that requests must have; may be given again. The environment's GFXLM_API_KEY counts, too.",
            **_HTTP,
        ),
    ] = None
    api_key_file: Annotated[Path | None, typer.Option(help="A file of keys, one a line.", metavar="FILE", **_HTTP)] = (
        None
    )
    ssl_keyfile: Annotated[Path | None, typer.Option(help="TLS: the private key.", metavar="FILE", **_HTTP)] = None
    ssl_certfile: Annotated[Path | None, typer.Option(help="TLS: the certificates.", metavar="FILE", **_HTTP)] = None
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            help="Web pages of these origins, with commas between them, may ask (CORS); * is any. Default: none.",
            **_HTTP,
        ),
    ] = None
    log_level: Annotated[LogLevel, typer.Option(help="How much is logged.", **_HTTP, case_sensitive=False)] = (
        LogLevel.INFO
    )
    log_format: Annotated[LogFormat, typer.Option(help="How it is logged, on stderr.", **_HTTP)] = LogFormat.TEXT
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what requests hold, too.", **_HTTP)] = False

    def keys(self) -> tuple[str, ...]:
        """All keys, of all sources. Raises UserError for a file that cannot be read, or holds none."""
        keys = [*(self.api_key or ()), *os.environ.get("GFXLM_API_KEY", "").split()]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--api-key-file: {self.api_key_file}: {error}") from error
            found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not found:
                raise UserError(f"--api-key-file: {self.api_key_file}: holds no key")
            keys += found
        if not all(keys):
            raise UserError("--api-key: is empty")
        return tuple(keys)

    def check(self) -> None:
        """Raise UserError for half of what TLS needs, and for what is no origin."""
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise UserError("--ssl-keyfile and --ssl-certfile: TLS needs both")
        for option, file in (("--ssl-keyfile", self.ssl_keyfile), ("--ssl-certfile", self.ssl_certfile)):
            if file is not None and not file.is_file():
                raise UserError(f"{option}: there is no file {file}")
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise UserError(f"--allowed-origins: must be like https://host or http://host:port, but is {origin!r}")

    @property
    def origins(self) -> tuple[str, ...]:
        """Pages of other origins that may ask."""
        return tuple(origin.strip() for given in self.allowed_origins or () for origin in given.split(","))


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """How much there may be at a time."""

    max_concurrency: Annotated[
        int,
        typer.Option(
            "--max-concurrency", "--decode-concurrency", min=1, help="Requests that run at the same time.", **_LIMITS
        ),
    ] = 32
    max_queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait besides; over it the answer is 429.", **_LIMITS)
    ] = 256
    max_context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a prompt and its answer. Default: what the model can.", **_LIMITS),
    ] = None
    max_body_size: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.", **_LIMITS)] = 16 << 20
    request_timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds that a request may take. Default: no limit.", **_LIMITS)
    ] = None
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have at SIGTERM.", **_LIMITS)
    ] = 30
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Prompt tokens to process at a time.", **_LIMITS)] = 2048
    no_prefix_cache: Annotated[
        bool, typer.Option("--no-prefix-cache", help="Read each prompt anew, from its first token.", **_LIMITS)
    ] = False
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same bits, whoever else is served.", **_LIMITS)
    ] = False


@dataclass(frozen=True, kw_only=True)
class DefaultOptions:
    """What counts where a request says nothing."""

    temp: Annotated[float | None, typer.Option("--temp", "--temperature", help="0 is greedy.", **_DEFAULTS)] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this mass.", **_DEFAULTS)] = None
    top_k: Annotated[int | None, typer.Option(help="Keep this many tokens; 0 keeps all.", **_DEFAULTS)] = None
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest one.", **_DEFAULTS)
    ] = None
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.", **_DEFAULTS)] = 512
    chat_template_args: Annotated[
        str | None,
        typer.Option(help='Arguments for the template: {"enable_thinking": false}.', metavar="JSON", **_DEFAULTS),
    ] = None
    tool_parser: Annotated[
        str | None, typer.Option(help="How the model writes tool calls. Default: as its template shows.", **_DEFAULTS)
    ] = None

    def sampling(self) -> dict[str, Any]:
        """By the names of `SamplingParams`. Raises UserError for a value out of range."""
        from gfxlm.engine.params import SamplingParams

        options = {"temperature": self.temp, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        SamplingParams(**given)
        return given


@dataclass(frozen=True, kw_only=True)
class ForeignOptions:
    """mlx_lm.server's options that are called something else here, or that there is no need or no support of."""

    prompt_concurrency: _Hidden = None
    prompt_cache_size: _Hidden = None
    prompt_cache_bytes: _Hidden = None
    adapter_path: _Hidden = None
    draft_model: _Hidden = None
    num_draft_tokens: _Hidden = None
    chat_template: _Hidden = None
    use_default_chat_template: _HiddenFlag = False
    pipeline: _HiddenFlag = False

    def check(self) -> None:
        """Raise UserError for any that is given, saying what to do instead."""
        for field in fields(self):
            if getattr(self, field.name):
                raise UserError(f"--{field.name.replace('_', '-')}: {_INSTEAD[field.name]}")


@grouped
def serve(
    models: ServedModels,
    http: HttpOptions,
    limits: LimitOptions,
    kv: KVCacheOptions,
    defaults: DefaultOptions,
    foreign: ForeignOptions,
) -> None:
    """Serve models over HTTP: OpenAI's routes and Anthropic's, a page to chat in, metrics. Ctrl-C ends it in order.

    The exit code is 1 if the engine has failed for good.
    """
    foreign.check()
    http.check()
    settings = _settings(http, limits, defaults)
    kv_params = kv.params()
    models.check()  # what is missing is said before anything listens

    from gfxlm.models.cache import KVOptions
    from gfxlm.server.opening import Opening
    from gfxlm.server.run import run

    opening = Opening(
        load=models.arguments(),
        kv=KVOptions(**kv_params),
        max_context=limits.max_context,
        max_concurrency=limits.max_concurrency,
        prefill_step_size=limits.prefill_step_size,
        prefix_cache=not (limits.no_prefix_cache or kv.max_kv_size),
        batch_invariant=limits.batch_invariant,
    )
    specs, resident = models.specs(opening)
    status = run(
        specs,
        settings,
        resident=resident,
        host=http.host,
        port=http.port,
        ssl_keyfile=http.ssl_keyfile,
        ssl_certfile=http.ssl_certfile,
        log_level=http.log_level.value,
        log_format=http.log_format.value,
    )
    raise typer.Exit(status)


def _settings(http: HttpOptions, limits: LimitOptions, defaults: DefaultOptions) -> "Settings":
    from gfxlm.server.settings import Settings
    from gfxlm.server.tools import named_format

    if limits.request_timeout == 0:
        raise UserError("--request-timeout: 0 s leave no time for any request; leave it out for no limit")
    if defaults.tool_parser is not None:
        named_format(defaults.tool_parser)  # what is not known is said before anything is loaded
    args = json_object("--chat-template-args", defaults.chat_template_args) if defaults.chat_template_args else {}
    return Settings(
        api_keys=http.keys(),
        allowed_origins=http.origins,
        max_body_size=limits.max_body_size,
        max_concurrency=limits.max_concurrency,
        max_queue=limits.max_queue,
        request_timeout=limits.request_timeout,
        shutdown_timeout=limits.shutdown_timeout,
        sampling=defaults.sampling(),
        max_tokens=defaults.max_tokens,
        chat_template_args=args,
        tool_parser=defaults.tool_parser,
        log_prompts=http.log_prompts,
    )
