"""What a sampler puts out: tokens, and their log probabilities where somebody asked for them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gfxlm.engine.params import MAX_TOP_LOGPROBS


class Draw(NamedTuple):
    """One token a row, int64 (R,), -1 where none could be; all log probabilities, fp32 (R, V), and `likeliest` ones."""

    tokens: Tensor
    logprobs: Tensor | None = None
    top: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token's natural log probability, and the likeliest tokens with theirs, the likeliest first.

    They are of the distribution after biases, penalties and a grammar, before temperature and filters. `top` has no
    more tokens than were asked for, and none of probability 0.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def likeliest(logits: Tensor, chosen: Tensor) -> Tensor:
    """What `token_logprob` reads: fp32 (R, 1 + 2 K) from logits (R, V) and the tokens chosen, int64 (R,), -1 for none.

    The columns are the log probability of the chosen token, those of the K = min(20, V) likeliest ones in descending
    order, and their ids as int32 bits: one tensor, because it travels to the host in one copy.
    """
    best, tokens = logits.topk(min(MAX_TOP_LOGPROBS, logits.shape[1]), dim=1)
    scores = torch.cat([logits.gather(1, chosen.clamp(min=0)[:, None]), best], dim=1).float()
    total = torch.logsumexp(logits.float(), dim=1, keepdim=True)
    return torch.cat([scores - total, tokens.int().view(torch.float32)], dim=1)


def token_logprob(row: Tensor, token: int, count: int) -> TokenLogprob:
    """One row of `likeliest` in host memory, (1 + 2 K,), with the `count` likeliest tokens of it."""
    k = len(row) // 2
    logprobs = row[: 1 + k].tolist()
    tokens = row[1 + k :].view(torch.int32).tolist()
    top = zip(tokens[:count], logprobs[1 : 1 + count], strict=True)
    return TokenLogprob(token, logprobs[0], tuple((other, value) for other, value in top if value > -torch.inf))
