"""Kernels that are started before the one before them has ended: NVIDIA's programmatic dependent launch."""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton that knows no NVIDIA GPU
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def after_the_last(early: tl.constexpr):
    """Wait until all that the kernel before this one has written can be read, and let the next one come up meanwhile.

    Before this a kernel reads and writes nothing. `early` is the compiler's option launch_pdl.
    """
    if early:
        gdc_wait()
        gdc_launch_dependents()
