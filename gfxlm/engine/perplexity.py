"""How well a model predicts a text."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.engine.diagnose import first_nan_module
from gfxlm.errors import GenerationError, UserError
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache
from gfxlm.ops.ragged import ragged

_LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood, its standard error, the tokens that were predicted, and the seconds."""

    value: float
    standard_error: float
    tokens: int
    seconds: float


@torch.inference_mode()
def perplexity(
    model: CausalLM,
    tokens: Sequence[int],
    sequence_length: int = 512,
    batch_size: int = 8,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """The perplexity of a text, cut into windows of `sequence_length` tokens that know nothing of each other.

    Every token of a window but its first is predicted from those before it, the last and shorter window included.
    Log-probabilities are fp32. The standard error is that of the mean over tokens, times the perplexity (the delta
    method), as in mlx-lm. `progress` is called with windows done and windows in all.
    Raises UserError for a text of fewer than two tokens or windows longer than the context, GenerationError for logits
    that are not finite.
    """
    limit = model.config.max_position_embeddings
    if not 2 <= sequence_length <= limit:
        raise UserError(f"sequence_length must be from 2 to the model's {limit}, but is {sequence_length}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, but is {batch_size}")
    if max(tokens, default=0) >= model.config.vocab_size:
        raise UserError(f"the text has token {max(tokens)}, the vocabulary has {model.config.vocab_size}")
    windows = [tokens[start : start + sequence_length] for start in range(0, len(tokens), sequence_length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise UserError(f"the text has {len(tokens)} tokens, but at least 2 are needed")
    start = time.perf_counter()
    cache = model.make_cache(min(batch_size, len(windows)), min(sequence_length, len(tokens)))
    losses = []
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        losses.append(_losses(model, batch, cache))
        progress(first + len(batch), len(windows))
    all_losses = torch.cat(losses).double()
    value = float(all_losses.mean().exp())
    deviation = float(all_losses.std()) if len(all_losses) > 1 else 0.0
    return Perplexity(
        value=value,
        standard_error=value * deviation / math.sqrt(len(all_losses)),
        tokens=len(all_losses),
        seconds=time.perf_counter() - start,
    )


def _losses(model: CausalLM, windows: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Negative log-likelihoods of every token that has one before it in its window: fp32, on the host."""
    inputs = torch.tensor([token for window in windows for token in window[:-1]], device=model.device)
    targets = torch.tensor([token for window in windows for token in window[1:]], device=model.device)
    lengths = [len(window) - 1 for window in windows]
    positions, slots = ragged(range(len(windows)), lengths, [0] * len(windows), model.device)
    hidden = model.forward(inputs, positions, slots, cache)
    # Logits of a whole batch may take more memory than the model.
    rows = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    losses = torch.cat(
        [
            F.cross_entropy(model.logits(h).float(), t, reduction="none")
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    )
    if not losses.isfinite().all():
        bad = next(w for w, part in zip(windows, losses.split(lengths), strict=True) if not part.isfinite().all())
        raise GenerationError(
            f"the logits are not finite; the first bad values come out of {first_nan_module(model, bad)}"
        )
    return losses.cpu()
