"""Kernels that are started before the one before them has ended: NVIDIA's programmatic dependent launch.

A kernel that declares the constant `early` is started so wherever the architecture can, which `launch` sees to. Every
program of it calls `after_the_last`, and before that neither reads nor writes memory, nor returns. Weights would be no
exception: what torch has just written may not be seen yet.
"""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton that knows no NVIDIA GPU
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def after_the_last(early: tl.constexpr):
    """Wait until all that the kernels before this one have written can be read."""
    if early:
        gdc_wait()


@triton.jit
def before_the_next(early: tl.constexpr):
    """Let the next kernel come up. One of few programs does so at once; many would leave it what room there is."""
    if early:
        gdc_launch_dependents()
