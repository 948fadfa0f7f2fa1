"""Which texts are single tokens of a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gfxlm.server.tools.grammar import literal

if TYPE_CHECKING:
    from gfxlm.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tokens, looked up one by one: as a dict they take long to copy."""

    tokenizer: "Tokenizer"

    def token(self, text: str) -> int | None:
        """The id of the token that is this text."""
        found = self.tokenizer.convert_tokens_to_ids(text)
        # An unknown token has the id of one that is there.
        known = isinstance(found, int) and self.tokenizer.convert_ids_to_tokens(found) == text
        return found if known else None

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and self.token(text) is not None

    def symbol(self, text: str) -> str:
        """The text in a Lark grammar: as a token where it is one, since llguidance's text never matches such."""
        token = self.token(text)
        return literal(text) if token is None else f"<[{token}]>"
