"""The tokenizer of a checkpoint: text to token ids and back, chats to prompts."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from gfxlm.engine.detokenizer import StreamingDetokenizer
from gfxlm.errors import UserError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "*.tiktoken")
_ROLES = ("system", "developer", "user", "assistant", "tool")
THINK_TAGS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|channel>", "<channel|>"),
)

Message = Mapping[str, Any]


class Tokenizer:
    """A transformers tokenizer with what generation needs besides; it answers for any attribute not here."""

    def __init__(self, tokenizer: Any, eos_token_ids: int | Iterable[int] | None = None) -> None:
        self._tokenizer = tokenizer
        ids = (eos_token_ids,) if isinstance(eos_token_ids, int) else eos_token_ids
        self.eos_token_ids: set[int] = set(ids or ())
        if tokenizer.eos_token_id is not None:
            self.eos_token_ids.add(tokenizer.eos_token_id)
        vocabulary = tokenizer.get_vocab()
        self.has_thinking = any(start in vocabulary and end in vocabulary for start, end in THINK_TAGS)

    def __getattr__(self, name: str) -> Any:
        # Private names are not passed on: copy and pickle ask for some before __init__ has run.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def add_eos_token(self, token: str) -> None:
        """Let a token, given by its text or its id, end a text too. Raises UserError for one that is not there."""
        vocabulary = self._tokenizer.get_vocab()
        found = vocabulary.get(token, int(token) if token.isdecimal() else -1)
        if not 0 <= found < len(self):
            raise UserError(f"{token!r} is no token of this model")
        self.eos_token_ids.add(found)

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a sequence, if the model has one."""
        token: str | None = self._tokenizer.bos_token
        return token

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """The token ids of `text`; by default with special tokens, unless it begins with the bos token."""
        if add_special_tokens is None:
            add_special_tokens = self.bos_token is None or not text.startswith(self.bos_token)
        # Quietly: whether a text is too long for the model is for the engine to say.
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of the tokens, spaces as they are, with U+FFFD for bytes that are not UTF-8."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def detokenizer(self) -> StreamingDetokenizer:
        """A new streaming detokenizer, for one request."""
        return StreamingDetokenizer(self)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[True] = ...,
        **template_kwargs: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[False],
        **template_kwargs: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tokenize: bool = True,
        **template_kwargs: Any,
    ) -> list[int] | str:
        """The prompt for a chat: token ids, or its text without `tokenize`.

        `template_kwargs` go to the template: `tools`, `enable_thinking` and so on. As in mlx-lm,
        `enable_thinking` is on for a model that has thinking tokens. Raises UserError for messages that the
        template refuses.
        """
        if not self.has_chat_template:
            raise UserError("this model has no chat template: pass the prompt as plain text")
        template_kwargs.setdefault("enable_thinking", self.has_thinking)
        checked = self._checked(messages, template_kwargs.get("tools"))
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                checked, add_generation_prompt=add_generation_prompt, tokenize=False, **template_kwargs
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"the chat template refuses these messages: {_one_line(error)}") from error
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _checked(self, messages: Sequence[Message], tools: Any) -> list[dict[str, Any]]:
        """The messages with known roles; `developer` becomes `system` where the template knows it not."""
        if not messages:
            raise UserError("messages is empty: a chat needs at least one message")
        template = self._tokenizer.get_chat_template(tools=tools)
        checked = []
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise UserError(f"messages[{i}] must be an object with a role, but is {message!r}")
            if message["role"] not in _ROLES:
                raise UserError(f"messages[{i}] has role {message['role']!r}; known are {', '.join(_ROLES)}")
            checked.append(dict(message))
            if message["role"] == "developer" and "developer" not in template:
                checked[-1]["role"] = "system"
        return checked


def load_tokenizer(
    path: str | Path, eos_token_ids: int | Iterable[int] | None = None, **tokenizer_config: Any
) -> Tokenizer:
    """The tokenizer in the folder `path`. Raises UserError where there is none or it cannot be read.

    `eos_token_ids` end a text besides the tokenizer's own eos token. `tokenizer_config` goes to transformers'
    `AutoTokenizer.from_pretrained`.
    """
    folder = Path(path)
    if not any(any(folder.glob(pattern)) for pattern in _FILES):
        raise UserError(f"no tokenizer in {folder}: looked for {', '.join(_FILES)}")
    # transformers takes seconds to import.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **tokenizer_config)
    except Exception as error:  # its readers raise nearly anything, the Rust one a bare Exception
        raise UserError(f"cannot read the tokenizer in {folder}: {_one_line(error)}") from error
    return Tokenizer(tokenizer, eos_token_ids)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
