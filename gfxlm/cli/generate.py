"""`gfxlm generate`: one prompt, one answer."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gfxlm.cli.options import (
    GrammarOptions,
    KVCacheOptions,
    ModelOptions,
    PromptCacheOptions,
    SamplingOptions,
    SpeculationOptions,
    grouped,
    json_object,
    unescaped,
)
from gfxlm.cli.progress import progress_bar
from gfxlm.cli.text import ended_line, note, read_text
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.engine.tokenizer import Tokenizer


@grouped
def generate(
    model: ModelOptions,
    sampling: SamplingOptions,
    grammar: GrammarOptions,
    kv: KVCacheOptions,
    prompt_cache: PromptCacheOptions,
    speculation: SpeculationOptions,
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
    max_context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens that the context holds at most. Default: what prompt and --max-tokens need, if it fits."
        ),
    ] = None,
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Prompt tokens to process at a time.")] = 2048,
    verbose: Annotated[bool, typer.Option("--verbose/--quiet", help="Print statistics on stderr at the end.")] = True,
) -> None:
    """Answer one prompt. The text goes to stdout as it comes, everything else to stderr."""
    params = sampling.params(max_tokens) | grammar.params()
    kv_params = kv.params()
    speculation.check(kv.max_kv_size)
    config = json_object("--chat-template-config", chat_template_config) if chat_template_config else {}
    text = read_text("-") if prompt == "-" else unescaped(prompt)

    from gfxlm.engine.generate import statistics, stream_generate

    model, file = prompt_cache.open(model, system_prompt)
    if file is not None:
        text, system_prompt = file.prompt + text, file.system_prompt
    lm, tokenizer = model.load(max_context=max_context, kv=kv_params)
    params = sampling.prepare(params, tokenizer) | speculation.params(model, tokenizer)
    if tokenizer.has_chat_template and not ignore_chat_template:
        tokens = _chat_tokens(tokenizer, text, system_prompt, prefill_response, config)
    elif system_prompt or prefill_response or config:
        why = "--ignore-chat-template is given" if ignore_chat_template else "this model has none"
        raise UserError(f"--system-prompt, --prefill-response and --chat-template-config need a chat template; {why}")
    else:
        tokens = tokenizer.encode(text)

    cache, cached_tokens, drafted = None, [], 0
    if file is not None:
        cache, kept = file.resume(lm, tokens, max_tokens, max_context, kv.max_kv_size)
        if 2 * kept < len(file.tokens):
            note(f"(this prompt goes on from {kept} of the {len(file.tokens)} tokens in {file.path})")
        cached_tokens, tokens = tokens[:kept], tokens[kept:]
    with progress_bar("reading the prompt") as progress, ended_line() as write:
        for response in stream_generate(
            lm,
            tokenizer,
            tokens,
            prefill_step_size=prefill_step_size,
            max_context=max_context,
            prompt_progress_callback=progress,
            prompt_cache=cache,
            cached_tokens=cached_tokens,
            **kv_params,
            **params,
        ):
            write(response.text)
            drafted += response.from_draft
    if verbose:
        note(statistics(response))
        if drafted:
            note(f"Drafted: {drafted} of {response.generation_tokens} tokens")


def _chat_tokens(
    tokenizer: "Tokenizer", text: str, system_prompt: str | None, prefill_response: str | None, config: dict[str, Any]
) -> list[int]:
    messages = [{"role": "user", "content": text}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    prefilled = prefill_response is not None
    if prefilled:
        messages.append({"role": "assistant", "content": prefill_response or ""})
    ours = {"add_generation_prompt": not prefilled, "continue_final_message": prefilled, "tokenize": True}
    tokens: list[int] = tokenizer.apply_chat_template(messages, **config | ours)
    return tokens
