"""The gated delta rule (Yang et al., 2025): linear attention whose state fades and corrects itself.

Per step, all float32: S = gamma S;  delta = beta (v - S k);  S = S + delta kᵀ;  y = S q.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gfxlm.kernels.batch import Batch, Span, batch_of
from gfxlm.ops._common import check_devices, on_gpu, widen

_CHUNK = 64

_Run = Callable[..., tuple[Tensor, Tensor]]


def decay(A_log: Tensor, a: Tensor, dt_bias: Tensor) -> Tensor:
    """exp(-exp(A_log) * softplus(a + dt_bias)), in float32 throughout.

    A_log and dt_bias are (Hv,), a is (..., Hv); the result is (..., Hv), in (0, 1]. ValueError if heads
    differ.
    """
    if not A_log.shape == dt_bias.shape == a.shape[-1:]:
        raise ValueError(
            f"decay: A_log {tuple(A_log.shape)}, dt_bias {tuple(dt_bias.shape)} and the last axis of a "
            f"{tuple(a.shape)} must be one number of heads"
        )
    check_devices("decay", a=a, A_log=A_log, dt_bias=dt_bias)
    step = widen(a) + dt_bias
    return (-widen(A_log).exp() * torch.logaddexp(step, step.new_zeros(()))).exp()


def gated_delta_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule over T steps.

    q and k are (B, T, Hk, Dk), v (B, T, Hv, Dv) with Hv a multiple of Hk, gamma the decay in linear space, at
    least 0, (B, T, Hv) or per key feature (B, T, Hv, Dk), beta (B, T, Hv), initial_state (B, Hv, Dv, Dk), zeros
    if None. A step where mask (B, T) is zero leaves the state alone and gives zeros.

    Returns y (B, T, Hv, Dv) in the type that q, k and v promote to, and the state after the last step,
    float32. On a GPU, bfloat16 and float16 go through the matrix units: what meets the state is rounded to that
    type once. ValueError if a shape does not fit or q, k and v are not floating.
    """
    _check(q, k, v, gamma, beta, initial_state, mask)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"gated_delta_update: q, k and v must be floating, got {dtype}")
    if initial_state is None:
        initial_state = q.new_zeros(v.shape[0], *v.shape[2:], k.shape[-1], dtype=torch.float32)
    state = widen(initial_state)
    if v.numel() == 0:
        return v.to(dtype), state
    if on_gpu(q) and torch.float64 not in (dtype, state.dtype):
        return _on_gpu(q, k, v, gamma, beta, state, mask, dtype)
    q, k, v, gamma, beta = widen(q), widen(k), widen(v), widen(gamma), widen(beta)
    if mask is not None:
        q, k, v, gamma, beta = _skip(q, k, v, gamma, beta, mask != 0)
    # Measured on the CPU: the chunked form is the quicker one from the second step on.
    recurrent = q.shape[1] == 1 or gamma.ndim == 4
    run: _Run = gated_delta_recurrent if recurrent else gated_delta_chunked
    if q.device.type != "cpu" or q.shape[0] == 1:
        y, state = run(q, k, v, gamma, beta, state)
        return y.to(dtype), state
    # One sequence at a time: its state stays in the processor's cache.
    sequences = zip(*(torch.split(x, 1) for x in (q, k, v, gamma, beta, state)), strict=True)
    outputs, states = zip(*(run(*sequence) for sequence in sequences), strict=True)
    return torch.cat(outputs).to(dtype), torch.cat(states)


def _on_gpu(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, state: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if mask is not None:
        q, k, v, gamma, beta = _skip(q, k, v, gamma, beta, mask != 0)
    sequences, length = q.shape[:2]
    spans = tuple(Span(i, i * length, (i + 1) * length, length) for i in range(sequences))
    q, k, v, gamma, beta = (x.flatten(0, 1).contiguous() for x in (q, k, v, gamma, beta))
    state = state.clone(memory_format=torch.contiguous_format)
    y = rule_over_rows(q, k, v, gamma, beta, state, batch_of(spans, q.device), dtype)
    return y.unflatten(0, (sequences, length)), state


def rule_over_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: Batch,
    dtype: torch.dtype,
    slots: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The rule on a GPU over sequences laid end to end: y (N, Hv, Dv), `state` updated in place.

    q and k are (N, Hk, Dk), v (N, Hv, Dv), whose rows are the `batch`'s. Sequence i has slot i of `state`, or the one
    that `slots` (N,) names; with `positions` (N,), one that starts at 0 starts from zeros.
    """
    from gfxlm.kernels.delta.chunks import delta_chunked
    from gfxlm.kernels.delta.recurrent import delta_recurrent

    alike = q.dtype == k.dtype == v.dtype == dtype
    if alike and dtype.itemsize == 2 and gamma.ndim == 2 and q.shape[2] <= 128 and batch.sequences < len(q):
        return delta_chunked(q, k, v, gamma.float(), beta.float(), state, batch, slots, positions)
    return delta_recurrent(q, k, v, gamma, beta, state, batch, dtype, slots, positions)


def gated_delta_recurrent(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule as written, one step after the other. Shapes as in `gated_delta_update`, float32, T > 0."""
    q, k = _per_value_head(q, k, v.shape[2])
    gamma = gamma.unsqueeze(-1) if gamma.ndim == 3 else gamma  # (B, T, H, 1 or Dk)
    outputs = []
    for t in range(q.shape[1]):
        key = k[:, t, :, None]  # (B, H, 1, Dk)
        state = state * gamma[:, t, :, None]
        delta = beta[:, t, :, None] * (v[:, t] - (state * key).sum(-1))  # (B, H, Dv)
        state = torch.addcmul(state, delta.unsqueeze(-1), key)
        outputs.append((state * q[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), state


def gated_delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, `_CHUNK` steps at a time. As in `gated_delta_recurrent`, and gamma is (B, T, Hv).

    Inside a chunk the corrections solve (I + tril(beta * ratio * K Kᵀ, -1)) Delta = beta * (V - decayed
    state's K), where ratio[i, j] is the product of gamma over steps j + 1 to i. It is multiplied up, never
    divided, so that a gamma of zero is exact.
    """
    q, k = _per_value_head(q, k, v.shape[2])
    q, k, v, gamma, beta = (x.transpose(1, 2) for x in (q, k, v, gamma.unsqueeze(-1), beta.unsqueeze(-1)))
    outputs = []
    chunks = zip(*(torch.split(x, _CHUNK, 2) for x in (q, k, v, gamma, beta)), strict=True)
    for query, key, value, gate, rate in chunks:
        steps = query.shape[2]
        later = torch.ones(steps, steps, dtype=torch.bool, device=q.device).tril(-1)
        ratio = torch.where(later, gate, 1.0).cumprod(2).tril()  # (B, H, C, C)
        carried = gate.cumprod(2)  # (B, H, C, 1): what is left of the state before the chunk
        correction = torch.linalg.solve_triangular(
            rate * ratio * (key @ key.mT),
            rate * (value - carried * (key @ state.mT)),
            upper=False,
            unitriangular=True,
        )  # (B, H, C, Dv)
        outputs.append(carried * (query @ state.mT) + (ratio * (query @ key.mT)) @ correction)
        left = ratio[:, :, -1, :, None]  # (B, H, C, 1): what is left of each step at the chunk's end
        state = carried[:, :, -1:] * state + (left * correction).mT @ key
    return torch.cat(outputs, 2).transpose(1, 2), state


def _per_value_head(q: Tensor, k: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    groups = heads // k.shape[2]
    return q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)


def _skip(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Steps that change nothing and read nothing where `keep` (B, T) is False: gamma one, all else zero."""
    drop = ~keep[..., None]
    row = drop.unsqueeze(-1)
    gamma = gamma.masked_fill(drop if gamma.ndim == 3 else row, 1)
    return (
        q.masked_fill(row, 0),
        k.masked_fill(row, 0),
        v.masked_fill(row, 0),
        gamma,
        beta.masked_fill(drop, 0),
    )


def _check(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, state: Tensor | None, mask: Tensor | None
) -> None:
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(
            f"gated_delta_update: q and k must both be (B, T, Hk, Dk), got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or q.shape[2] == 0 or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"gated_delta_update: v must be (B, T, Hv, Dv), Hv a multiple of q's heads, got {tuple(v.shape)} "
            f"for q {tuple(q.shape)}"
        )
    rates = v.shape[:3]
    wanted: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
        ("gamma", gamma, [rates, (*rates, q.shape[3])]),
        ("beta", beta, [rates]),
        ("initial_state", state, [(v.shape[0], *v.shape[2:], q.shape[3])]),
        ("mask", mask, [q.shape[:2]]),
    ]
    for name, x, shapes in wanted:
        if x is not None and x.shape not in shapes:
            allowed = " or ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"gated_delta_update: {name} must be {allowed}, got {tuple(x.shape)}")
    check_devices("gated_delta_update", q=q, k=k, v=v, gamma=gamma, beta=beta, initial_state=state, mask=mask)
