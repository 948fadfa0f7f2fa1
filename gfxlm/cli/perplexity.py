"""`gfxlm perplexity`: how well a model predicts a text file."""

import json
from enum import StrEnum
from typing import Annotated

import typer

from gfxlm.cli.options import ModelOptions, grouped
from gfxlm.cli.progress import progress_bar
from gfxlm.cli.text import read_text


class Output(StrEnum):
    """How the result is printed."""

    TEXT = "text"
    JSON = "json"


@grouped
def perplexity(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A UTF-8 text file; - reads stdin.")],
    model: ModelOptions,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window; windows know nothing of each other.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Windows to process at a time.")] = 8,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-m", min=2, help="Look at no more than this much of the text.")
    ] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")] = Output.TEXT,
) -> None:
    """Measure a model's perplexity on a text file. Needs no network."""
    text = read_text(file)

    from gfxlm.engine.perplexity import perplexity as measure

    lm, tokenizer = model.load()
    tokens = tokenizer.encode(text)[:max_tokens]
    with progress_bar("windows") as progress:
        result = measure(lm, tokens, sequence_length, batch_size, progress=progress)
    speed = result.tokens / result.seconds
    if output == Output.JSON:
        fields = {
            "model": model.path,
            "perplexity": result.value,
            "standard_error": result.standard_error,
            "tokens": result.tokens,
            "sequence_length": sequence_length,
            "tokens_per_second": speed,
        }
        print(json.dumps(fields))
    else:
        print(
            f"perplexity {result.value:.4f} ± {result.standard_error:.4f} "
            f"({result.tokens} tokens in windows of {sequence_length}, {speed:.1f} tokens/s)"
        )
