"""`gfxlm generate`: one prompt, one answer."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gfxlm.cli.options import ModelOptions, SamplingOptions, grouped, json_object, unescaped
from gfxlm.cli.progress import progress_bar
from gfxlm.cli.text import note, read_text
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.engine.tokenizer import Tokenizer


@grouped
def generate(
    model: ModelOptions,
    sampling: SamplingOptions,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer; - reads it from stdin.")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Stop after this many tokens; -1 goes on to the context's end.")
    ] = 100,
    system_prompt: Annotated[str | None, typer.Option(help="A system message before the prompt.")] = None,
    prefill_response: Annotated[str | None, typer.Option(help="How the answer begins.")] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Continue the prompt as it is.")
    ] = False,
    chat_template_config: Annotated[
        str | None, typer.Option(help='Arguments for the template: {"enable_thinking": false}.', metavar="JSON")
    ] = None,
    prefill_step_size: Annotated[int, typer.Option(help="Prompt tokens to process at a time.")] = 2048,
    verbose: Annotated[bool, typer.Option("--verbose/--quiet", help="Print statistics on stderr at the end.")] = True,
) -> None:
    """Answer one prompt. The text goes to stdout as it comes, everything else to stderr."""
    params = sampling.params()
    chat: dict[str, Any] = {}
    if not ignore_chat_template:
        chat = {
            "--system-prompt": system_prompt,
            "--prefill-response": prefill_response,
            "--chat-template-config": json_object("--chat-template-config", chat_template_config or "{}"),
        }
    text = read_text("-") if prompt == "-" else unescaped(prompt)

    from gfxlm.engine.generate import statistics, stream_generate

    lm, tokenizer = model.load()
    params = sampling.prepare(params, tokenizer)
