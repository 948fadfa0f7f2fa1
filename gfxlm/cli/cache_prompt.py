"""`gfxlm cache-prompt`: let a model read a prompt once, for all that goes on from it."""

from typing import Annotated

import typer

from gfxlm.cli.options import KVCacheOptions, ModelOptions, grouped, unescaped
from gfxlm.cli.progress import progress_bar
from gfxlm.cli.text import note, read_text


@grouped
def cache_prompt(
    model: ModelOptions,
    kv: KVCacheOptions,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to read; - reads it from stdin.")],
    prompt_cache_file: Annotated[str, typer.Option(help="The file to write.", metavar="FILE")],
    system_prompt: Annotated[str | None, typer.Option(help="A system message before the prompt.")] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Take the prompt as it is.")
    ] = False,
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Prompt tokens to process at a time.")] = 2048,
) -> None:
    """Read a prompt and keep what the model made of it. `generate` and `chat` go on from there."""
    params = kv.params()
    text = read_text("-") if prompt == "-" else unescaped(prompt)

    from pathlib import Path

    from gfxlm.engine.prompt_cache import cache_prompt as write
    from gfxlm.models.cache import KVOptions

    lm, tokenizer = model.load(kv=params)
    file = Path(prompt_cache_file).expanduser()
    with progress_bar("reading the prompt") as progress:
        count = write(
            lm,
            tokenizer,
            text,
            file,
            model_name=model.path,
            system_prompt=system_prompt,
            ignore_chat_template=ignore_chat_template,
            kv=KVOptions(**params),
            prefill_step_size=prefill_step_size,
            progress=progress,
        )
    note(f"{file}: {count} tokens, {file.stat().st_size / 1e6:.1f} MB")
