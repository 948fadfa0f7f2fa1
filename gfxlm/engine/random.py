"""Random numbers as a pure function of (seed, position, lane): a GPU graph can hold them, they have no state.

The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). Its
i-th output is a mix of `seed + (i + 1) * GAMMA`, so any of them is had at once. int64 tensors wrap as
unsigned words do; only the right shift has to be made logical by hand.
"""

import torch
from torch import Tensor


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(seed: Tensor, index: Tensor) -> Tensor:
    """The `index`-th output, from 0, of the SplitMix64 generator seeded with `seed`: int64, broadcast."""
    words = seed + (index + 1) * _GAMMA
    words = (words ^ _shift_right(words, 30)) * _MIX_1
    words = (words ^ _shift_right(words, 27)) * _MIX_2
    return words ^ _shift_right(words, 31)


def uniform(seed: Tensor, position: Tensor, lanes: int | Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), the same bits on every device.

    `seed` and `position` are int64 (B,). `lanes` is how many to draw, for lanes 0 onwards, or the lanes
    themselves, int64 (n,) or (B, n). Returns fp32 (B, n).
    """
    if isinstance(lanes, int):
        lanes = torch.arange(lanes, device=seed.device)
    stream = splitmix64(seed, position)[:, None]  # (B, 1)
    high = _shift_right(splitmix64(stream, lanes), 32)  # (B, n), 32 bits
    # The top of the range would round up to 1.0.
    return ((high.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)


def gumbel(seed: Tensor, position: Tensor, lanes: int | Tensor) -> Tensor:
    """Standard Gumbel numbers, fp32 (B, n); arguments as for `uniform`.

    The argmax of logits plus Gumbel noise is a sample of their softmax.
    """
    # log1p, because uniform numbers are finest near 0, and large values, which decide an argmax, need that.
    return -torch.log(-torch.log1p(-uniform(seed, position, lanes)))
