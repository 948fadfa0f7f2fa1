"""`gfxlm bench serve`: the speed of a running server, as its users see it."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gfxlm.cli.progress import progress_bar
from gfxlm.cli.traffic.plan import Endpoint, Load
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.cli.traffic.client import Target
    from gfxlm.cli.traffic.report import Report


def bench_serve(
    base_url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8080",
    model: Annotated[str | None, typer.Option(help="Its model. Default: the first it names.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=["GFXLM_API_KEY", "OPENAI_API_KEY"], help="What it asks for.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many to send.")] = 100,
    rate: Annotated[
        str, typer.Option(help="Requests a second, arriving at random (Poisson); inf: all at once.", metavar="R")
    ] = "inf",
    concurrency: Annotated[int | None, typer.Option(min=1, help="Send no more than so many at a time.")] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt; of a chat's, about.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    shared_prefix: Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with.")] = 0,
    endpoint: Annotated[
        Endpoint, typer.Option(help="Prompts of token ids, or chats of random words.")
    ] = Endpoint.COMPLETIONS,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="table|json|FILE.json", help="How to tell the results.")
    ] = "table",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw them as well; wants matplotlib.")] = None,
) -> None:
    """Measure a running server over HTTP: throughput, first token, time between tokens, percentiles, errors.

    Any server with OpenAI's routes will do. One request warms up and is not counted. Arrivals are fixed beforehand, and
    times count from a request's arrival, so that a server that falls behind is seen to; with --concurrency and no
    --rate, a request arrives when one before it is done. The exit code is 1 if any request failed.
    """
    if output not in ("table", "json") and not output.endswith(".json"):
        raise UserError(f"--output: expected table, json or a file that ends in .json, but got {output!r}")
    if shared_prefix >= input_tokens:
        raise UserError(f"--shared-prefix: must leave a token of --input-tokens {input_tokens}, but is {shared_prefix}")
    for option, path in (("--output", Path(output)), ("--plot", plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{option}: {path}: its folder does not exist")
    arrivals = _rate(rate)

    from gfxlm.cli.traffic.client import Target

    if plot is not None:
        from gfxlm.cli.traffic.plot import check

        check(plot)
    load = Load(requests, input_tokens, output_tokens, arrivals, concurrency, shared_prefix, seed)
    report = _measure(Target(base_url, model, api_key, endpoint), load)
    _tell(report, output)
    if plot is not None:
        from gfxlm.cli.traffic.plot import plot as draw

        draw(report, plot)
    if report.errors:
        raise typer.Exit(1)


def _measure(target: "Target", load: Load) -> "Report":
    import asyncio

    from gfxlm.cli.traffic.client import run
    from gfxlm.cli.traffic.report import Report

    with progress_bar("requests") as progress:
        model, samples = asyncio.run(run(target, load, progress))
    return Report(target.address, model, target.endpoint, load, samples)


def _tell(report: "Report", output: str) -> None:
    from gfxlm.cli.traffic.report import table

    if output == "json":
        print(json.dumps(report.as_json(), indent=2))
        return
    print(table(report))
    if output != "table":
        Path(output).write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise UserError(f"--rate: expected requests a second above 0, or inf, but got {text!r}")
    return rate
