"""The random numbers of `gfxlm.engine.random`, inside a kernel: a function of (seed, position, token) alone."""

import triton
import triton.language as tl

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def splitmix64(seed, index):
    """The index-th output, from 0, of the SplitMix64 generator seeded with `seed`: int64 or uint64, to uint64."""
    words = seed.to(tl.uint64) + (index.to(tl.uint64) + 1) * _GAMMA
    words = (words ^ (words >> 30)) * _MIX_1
    words = (words ^ (words >> 27)) * _MIX_2
    return words ^ (words >> 31)


@triton.jit
def gumbel(stream, tokens):
    """Standard Gumbel numbers, fp32, of the tokens: stream is `splitmix64(seed, position)`."""
    high = (splitmix64(stream, tokens.to(tl.int64)) >> 32).to(tl.uint32)
    u = tl.minimum((high.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    # log1p(-u): the quotient makes good what 1 - u has rounded away.
    rest = 1.0 - u
    log = tl.where(rest == 1.0, -u, tl.log(rest) * (-u / (rest - 1.0)))
    return -tl.log(-log)
