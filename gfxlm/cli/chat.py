"""`gfxlm chat`: a conversation at the terminal."""

import contextlib
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gfxlm.cli.options import (
    KVCacheOptions,
    ModelOptions,
    PromptCacheOptions,
    SamplingOptions,
    SpeculationOptions,
    grouped,
    json_object,
)
from gfxlm.cli.progress import progress_bar
from gfxlm.cli.text import ended_line, note
from gfxlm.errors import GenerationError, UserError

if TYPE_CHECKING:
    from gfxlm.engine.conversation import Conversation

_PROMPT = ">>> "
_HELP = """/reset (r)  forget the conversation
/help (h)   this list
/exit (q)   end, as Ctrl-D does
Ctrl-C      stop the answer"""


@grouped
def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    kv: KVCacheOptions,
    prompt_cache: PromptCacheOptions,
    speculation: SpeculationOptions,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Stop an answer after this many tokens; -1 sets no limit.")
    ] = 256,
    system_prompt: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    chat_template_config: Annotated[
        str | None, typer.Option(help='Arguments for the template: {"enable_thinking": false}.', metavar="JSON")
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that the conversation can have. Default: the model's limit, if they fit; without "
            "--max-kv-size at most 32768.",
        ),
    ] = None,
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Prompt tokens to process at a time.")] = 2048,
) -> None:
    """Talk with a model. Answers go to stdout, everything else to stderr. /help lists the commands."""
    params = sampling.params(max_tokens)
    kv_params = kv.params()
    speculation.check(kv.max_kv_size)
    config = json_object("--chat-template-config", chat_template_config) if chat_template_config else {}

    from gfxlm.engine.budget import LEAST_CONTEXT
    from gfxlm.engine.conversation import Conversation
    from gfxlm.engine.drafters import drafter_for, remaining_with
    from gfxlm.models.cache import KVOptions, default_context

    model, file = prompt_cache.open(model, system_prompt)
    lm, tokenizer = model.load(max_context=max_context, kv=kv_params)
    drafts = speculation.params(model, tokenizer)
    options = sampling.prepare(params, tokenizer) | drafts | {"prefill_step_size": prefill_step_size}
    cache = KVOptions(**kv_params) if file is None else file.sized(KVOptions(**kv_params))
    wanted = max_context or default_context(cache.model_for(lm, 0))
    drafter = drafter_for(**drafts)
    budget = remaining_with(drafter, cache.model_for(lm, wanted), prefill_step_size=prefill_step_size)
    context = budget.fit(wanted, least=LEAST_CONTEXT, exact=max_context is not None)
    conversation = Conversation(
        lm,
        tokenizer,
        system_prompt=system_prompt,
        max_context=context,
        template_kwargs=config,
        kv=cache,
        prompt_file=file,
    )
    if not tokenizer.has_chat_template:
        if config:
            raise UserError("--chat-template-config: this model has no chat template")
        note("This model has no chat template: it continues the text that you type.")
    if sys.stdin.isatty():
        note("/help lists the commands, /exit ends.")
    _converse(conversation, options)


def _converse(conversation: "Conversation", options: dict[str, Any]) -> None:
    warned = False
    while True:
        try:
            line = _read_line()
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned:
                raise
            warned = True
            note("\nCtrl-C once more ends the program, and so does /exit.")
            continue
        warned = False
        command = line.strip()
        if command in ("/exit", "/quit", "q"):
            return
        if command in ("/reset", "r"):
            conversation.reset()
            note("The conversation is forgotten.")
        elif command in ("/help", "h"):
            note(_HELP)
        elif command.startswith("/") and command[1:].isalpha():
            note(f"{command} is no command; /help lists them.")
        elif command:
            _answer(conversation, line, options)


def _read_line() -> str:
    if not sys.stdin.isatty():
        return input()
    # Importing it is what gives input() its line editing and history.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    try:
        if sys.stdout.isatty():
            return input(_PROMPT)
        print(_PROMPT, end="", file=sys.stderr, flush=True)
        return input()
    except EOFError:
        note()
        raise


def _answer(conversation: "Conversation", question: str, options: dict[str, Any]) -> None:
    """Stream the answer to one question. Whatever goes wrong with it is told in one line, and the chat goes on."""
    finish_reason = None
    try:
        with _Stop() as stop, progress_bar("reading") as progress, ended_line() as write:

            def watch(done: int, total: int) -> None:
                progress(done, total)
                stop.check()

            answer = conversation.ask(question, prompt_progress_callback=watch, **options)
            with contextlib.closing(answer):
                for response in answer:
                    write(response.text)
                    finish_reason = response.finish_reason
                    stop.check()
    except (_Stopped, KeyboardInterrupt):
        note("(stopped)")
    except UserError as error:
        note(f"gfxlm: {error}; /reset starts a new conversation")
    except GenerationError as error:
        note(f"gfxlm: {error}")
    if conversation.full:
        note(f"(the context of {conversation.max_context} tokens is full; /reset starts a new conversation)")
    elif finish_reason == "length":
        note(f"(stopped after {options['max_tokens']} tokens, as --max-tokens says)")


class _Stopped(Exception):  # noqa: N818
    """The person at the keyboard has heard enough."""


class _Stop:
    """While it is entered, Ctrl-C asks for a stop at the next `check`; a second Ctrl-C interrupts at once."""

    def __enter__(self) -> "_Stop":
        self._wanted = False
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._wanted:
            raise KeyboardInterrupt
        self._wanted = True

    def check(self) -> None:
        """Raise `_Stopped` if Ctrl-C was pressed."""
        if self._wanted:
            raise _Stopped
