"""Log probabilities in OpenAI's words."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gfxlm.engine.logprobs import TokenLogprob

if TYPE_CHECKING:
    from gfxlm.engine.tokenizer import Tokenizer


def described(tokenizer: "Tokenizer", logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """An entry for each token, with the likeliest ones in its place."""
    return [
        _token(tokenizer, one.token, one.logprob)
        | {"top_logprobs": [_token(tokenizer, token, logprob) for token, logprob in one.top]}
        for one in logprobs
    ]


def _token(tokenizer: "Tokenizer", token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    # Half a character has bytes that its text does not tell.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
