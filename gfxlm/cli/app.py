"""What `gfxlm` consists of, and what becomes of the errors of its commands."""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gfxlm import __version__
from gfxlm.cli import (
    bench,
    bench_serve,
    cache_prompt,
    chat,
    convert,
    doctor,
    generate,
    info,
    kernels,
    perplexity,
    serve,
    tune,
    warmup,
)
from gfxlm.errors import GenerationError, UserError


class Commands(TyperGroup):
    """The commands. Their errors become one line on stderr and an exit code, as do Ctrl-C and a closed pipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _usage_errors_on_one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        # What the libraries below have to say would mix with what we say.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.formatwarning = lambda message, *_, **__: f"gfxlm: {message}\n"
        try:
            with _usage_errors_on_one_line():
                result = super().invoke(ctx)
            print(end="", flush=True)  # a full disk and a closed pipe show here at the latest
            return result
        except KeyboardInterrupt:
            raise typer.Exit(128 + signal.SIGINT) from None
        except BrokenPipeError:
            # The interpreter flushes stdout once more as it ends; there, the error could no longer be caught.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + signal.SIGPIPE) from None
        except UserError as error:
            raise _complaint(str(error), 2) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise _complaint(f"{error.filename}: {reason}" if error.filename else reason, 2) from error
        except GenerationError as error:
            raise _complaint(str(error), 2) from error
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise _complaint("out of memory; a shorter context or a smaller batch needs less", 1) from error


@contextmanager
def _usage_errors_on_one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The classes are click's or typer's own, as typer's version has it; no arguments at all print the help.
        names = {kind.__name__ for kind in type(error).__mro__}
        if "UsageError" not in names or "NoArgsIsHelpError" in names:
            raise
        raise _complaint(f"{error.format_message()} (--help lists the options)", 2) from error  # type: ignore[attr-defined]


def _complaint(message: str, code: int) -> typer.Exit:
    print(f"gfxlm: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return typer.Exit(code)


def _is_out_of_memory(error: Exception) -> bool:
    # torch's own class cannot be named here without importing torch; its CPU allocator raises a bare RuntimeError.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gfxlm {__version__}")
        raise typer.Exit


@app.callback()
def gfxlm(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """MLX-format language models, fast on AMD GPUs, NVIDIA GPUs and plain CPUs."""


for command in (
    generate.generate,
    chat.chat,
    serve.serve,
    cache_prompt.cache_prompt,
    perplexity.perplexity,
    info.info,
    convert.convert,
    doctor.doctor,
    kernels.kernels,
    warmup.warmup,
    tune.tune,
):
    app.command()(command)

benches = typer.Typer(invoke_without_command=True, context_settings=app.info.context_settings)
benches.callback()(bench.bench)
benches.command("serve")(bench_serve.bench_serve)
app.add_typer(benches, name="bench")
