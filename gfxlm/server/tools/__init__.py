"""How models write calls of tools, and how to read them."""

from collections.abc import Container, Mapping, Sequence
from typing import Protocol

from gfxlm.errors import UserError
from gfxlm.server.incremental import Source
from gfxlm.server.tools.grammar import Symbol
from gfxlm.server.tools.llama import Llama
from gfxlm.server.tools.mistral import Mistral
from gfxlm.server.tools.qwen import Hermes, Qwen3Coder
from gfxlm.server.tools.tool import Parse, Tool


class Format(Protocol):
    """One way to write calls."""

    name: str
    trigger: str  # the tag that begins a call, "" where none does

    def parse(self, source: Source, tools: Mapping[str, Tool]) -> Parse:
        """The parser: content and calls, in the order of the text."""

    def call_id(self) -> str:
        """A new one, that the model's template takes back."""

    def rules(self, tools: Sequence[Tool], symbol: Symbol, *, parallel: bool) -> str:
        """Lark rules, of which `rest` is all that may follow the trigger."""


FORMATS = ("hermes", "qwen3_coder", "llama", "mistral")
# What mlx-lm and vLLM call them.
_OTHER_NAMES = {"json_tools": "hermes", "qwen3_xml": "qwen3_coder", "llama3_json": "llama", "pythonic": "llama"}
# What tells a format.
_TAGS = {"mistral": "[TOOL_CALLS]", "hermes": "<tool_call>", "llama": "<|python_tag|>"}


def named_format(name: str, template: str = "") -> Format:
    """The format of that name. Raises UserError for one that is not known."""
    name = _OTHER_NAMES.get(name, name)
    if name not in FORMATS:
        raise UserError(f"tool_parser must be one of {', '.join(FORMATS)}, but is {name!r}")
    if name == "mistral":
        return Mistral(template)
    others: dict[str, Format] = {"hermes": Hermes(), "qwen3_coder": Qwen3Coder(), "llama": Llama()}
    return others[name]


def detected_format(template: str, vocabulary: Container[str]) -> Format | None:
    """The format that a chat template writes, or that the vocabulary has tags for; None where neither tells."""
    if "<tool_call>\n<function=" in template or "<tool_call>\\n<function=" in template:
        return Qwen3Coder()
    for name, tag in _TAGS.items():
        if tag in template:
            return named_format(name, template)
    # Llama 3.2's template for its small models names no tag.
    if '"parameters": dictionary' in template:
        return Llama()
    for name, tag in _TAGS.items():
        if tag in vocabulary:
            return named_format(name, " ".join(tag for tag in ("[ARGS]", "[CALL_ID]") if tag in vocabulary))
    return None
