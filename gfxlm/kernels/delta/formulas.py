"""What the gated delta net's kernels share: the gates, SiLU, and the norms' factors, all in fp32."""

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp may overflow, the result does not."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def decay(A_log, a, dt_bias):
    """exp(-exp(A_log) * softplus(a + dt_bias))."""
    step = a + dt_bias
    small = tl.exp(-tl.abs(step))
    # The series where 1 + small would have lost small's digits.
    series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0 - 0.25 * small)))
    softplus = tl.maximum(step, 0.0) + tl.where(small < 0.03, series, tl.log(1.0 + small))
    return tl.exp(-tl.exp(A_log) * softplus)


@triton.jit
def inverse_root(x):
    """1 / sqrt(x), both rounded as IEEE wants it."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))
