"""All of a gated delta net (arXiv 2412.06464) between its projections, over a flattened ragged batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.kernels.batch import Span, batch_of
from gfxlm.ops._common import check_devices, on_gpu
from gfxlm.ops.convolution import causal_conv1d
from gfxlm.ops.delta import decay, gated_delta_update, rule_over_rows
from gfxlm.ops.normalization import l2_normalize, rms_norm
from gfxlm.ops.ragged import Slots, check_slots


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """What a gated delta net holds besides its projections, and its sizes.

    The convolution's channels, conv (taps, C), are [all q | all k | all v]. A_log and dt_bias are fp32 (Hv,), norm is
    (Dv,). C = 2 Hk Dk + Hv Dv.
    """

    conv: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float
    k_heads: int

    @property
    def v_heads(self) -> int:
        """Hv, a multiple of k_heads."""
        return self.A_log.shape[0]

    @property
    def v_dim(self) -> int:
        """Dv."""
        return self.norm.shape[0]

    @property
    def k_dim(self) -> int:
        """Dk."""
        return (self.conv.shape[1] - self.v_heads * self.v_dim) // (2 * self.k_heads)


def gated_delta_mixer(
    qkvz: Tensor, ba: Tensor, weights: DeltaWeights, positions: Tensor, slots: Slots, conv: Tensor, state: Tensor
) -> Tensor:
    """Convolution and SiLU, l2norm of q and k, the gated delta rule, and rms_norm(y) * silu(z): (N, Hv * Dv).

    qkvz (N, 2 Hk Dk + 2 Hv Dv) and ba (N, 2 Hv) are grouped by key head: [q | k | v of its value heads | their z] and
    [b | a]; beta = sigmoid(b), and gamma is `decay` of a. Sequences continue what their slots hold, and one that starts
    at position 0 starts from nothing: conv (slots, taps, C) has the input of position p at p % taps, state is fp32
    (slots, Hv, Dv, Dk), both updated in place. A row whose slot is negative is padding and touches no slot; in a
    batch of one row a sequence, where no span has it, it gives zeros.

    The result has qkvz's type. ValueError if a shape or type does not fit.
    """
    _check(qkvz, ba, weights, conv, state)
    check_slots("gated_delta_mixer", len(qkvz), positions, slots)
    check_devices(
        "gated_delta_mixer", qkvz=qkvz, ba=ba, conv_weight=weights.conv, A_log=weights.A_log, dt_bias=weights.dt_bias,
        norm=weights.norm, positions=positions, index=slots.index, conv=conv, state=state,
    )  # fmt: skip
    spans = tuple(span for span in slots.spans if span.rows)
    single = slots.batch is None and all(span.rows == 1 for span in spans)
    _check_spans(spans, len(qkvz), single or slots.batch is not None)
    if on_gpu(qkvz) and torch.float64 not in (qkvz.dtype, state.dtype):
        run = _step_on_gpu if single else _prefill_on_gpu
        return run(qkvz, ba, weights, positions, slots, conv, state)
    qkv, z, b, a = _arrange(qkvz, ba, weights)
    inputs = [qkv, decay(weights.A_log, a, weights.dt_bias), torch.sigmoid(b.float())]  # gamma, beta (N, Hv)
    if single:
        y = _rows(inputs, weights, positions, slots, conv, state)
    else:
        y = _sequences(inputs, weights, positions, slots, conv, state)
    gated = rms_norm(y, weights.norm, weights.eps) * F.silu(z.float())
    return gated.to(qkvz.dtype).flatten(-2)


def _arrange(qkvz: Tensor, ba: Tensor, weights: DeltaWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv (N, C) with its channels in the convolution's order, z (N, Hv, Dv), b and a (N, Hv)."""
    values = weights.v_heads // weights.k_heads * weights.v_dim
    per_head = qkvz.unflatten(-1, (weights.k_heads, -1))
    q, k, v, z = per_head.split([weights.k_dim, weights.k_dim, values, values], dim=-1)
    b, a = ba.unflatten(-1, (weights.k_heads, -1)).chunk(2, dim=-1)  # (N, Hk, Hv / Hk) each
    qkv = torch.cat([t.flatten(-2) for t in (q, k, v)], dim=-1)
    return qkv, z.reshape(-1, weights.v_heads, weights.v_dim), b.flatten(-2), a.flatten(-2)


def _rows(
    inputs: list[Tensor], weights: DeltaWeights, positions: Tensor, slots: Slots, conv: Tensor, state: Tensor
) -> Tensor:
    """One token a sequence: the batch is the sequences. Rows of padding, which no span has, are left out."""
    rows = [span.start for span in slots.spans if span.rows]
    if len(rows) == len(positions):
        return _mix([t[:, None] for t in inputs], weights, positions, slots.index, conv, state)[:, 0]
    inputs = [t[rows][:, None] for t in inputs]
    mixed = _mix(inputs, weights, positions[rows], slots.index[rows], conv, state)[:, 0]
    y = mixed.new_zeros(len(positions), *mixed.shape[1:])
    y[rows] = mixed
    return y


def _sequences(
    inputs: list[Tensor], weights: DeltaWeights, positions: Tensor, slots: Slots, conv: Tensor, state: Tensor
) -> Tensor:
    outputs = []
    for span in slots.spans:
        if span.rows:
            first = slice(span.start, span.start + 1)
            sequence = [t[None, span.start : span.stop] for t in inputs]
            outputs.append(_mix(sequence, weights, positions[first], slots.index[first], conv, state)[0])
    return torch.cat(outputs)


def _mix(
    inputs: list[Tensor], weights: DeltaWeights, first_positions: Tensor, slots: Tensor, conv: Tensor, state: Tensor
) -> Tensor:
    """Convolve and recur over sequences of one length, slots updated in place.

    `inputs` are qkv (B, T, C), gamma and beta (B, T, Hv); returns fp32 (B, T, Hv, Dv).
    """
    qkv, gamma, beta = inputs
    taps = weights.conv.shape[0]
    # What came before and comes last, as places in the ring: inputs before position 0 are zero, whatever lies there.
    before = first_positions[:, None] + torch.arange(1 - taps, 0, device=qkv.device)  # (B, taps - 1)
    ring = (slots[:, None], before % taps)
    tail = torch.where((before >= 0).unsqueeze(-1), conv[ring], 0)
    initial = torch.where((first_positions > 0)[:, None, None, None], state[slots], 0)
    qkv, tail = causal_conv1d(qkv, weights.conv.mT, state=tail, activation="silu")
    key_size = weights.k_heads * weights.k_dim
    q, k, v = qkv.split([key_size, key_size, weights.v_heads * weights.v_dim], dim=-1)
    q, k = (l2_normalize(t.unflatten(-1, (weights.k_heads, -1))) for t in (q, k))  # (B, T, Hk, Dk) fp32
    v = v.unflatten(-1, (weights.v_heads, -1))  # (B, T, Hv, Dv)
    y, last = gated_delta_update(q * weights.k_dim**-0.5, k, v, gamma, beta, initial)
    conv[slots[:, None], (before + qkv.shape[1]) % taps] = tail
    state.index_copy_(0, slots, last)
    return y


def _step_on_gpu(
    qkvz: Tensor, ba: Tensor, weights: DeltaWeights, positions: Tensor, slots: Slots, conv: Tensor, state: Tensor
) -> Tensor:
    from gfxlm.kernels.delta.step import delta_step

    return delta_step(
        qkvz,
        ba,
        weights.conv,
        weights.A_log,
        weights.dt_bias,
        weights.norm,
        weights.eps,
        weights.k_heads,
        positions,
        slots.index,
        conv,
        state,
    )


def _prefill_on_gpu(
    qkvz: Tensor, ba: Tensor, weights: DeltaWeights, positions: Tensor, slots: Slots, conv: Tensor, state: Tensor
) -> Tensor:
    from gfxlm.kernels.delta.prepare import gated_norm, prepare

    batch = slots.batch or batch_of(slots.spans, qkvz.device)
    k_heads, k_dim, v_dim = weights.k_heads, weights.k_dim, weights.v_dim
    qkv, gamma, beta = prepare(
        qkvz,
        ba,
        weights.conv,
        weights.A_log,
        weights.dt_bias,
        k_heads,
        v_dim,
        positions,
        slots.index,
        conv,
        batch,
    )
    parts = qkv.split([k_heads * k_dim, k_heads * k_dim, weights.v_heads * v_dim], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, dim)) for x, dim in zip(parts, (k_dim, k_dim, v_dim), strict=True))
    y = rule_over_rows(q, k, v, gamma, beta, state, batch, qkvz.dtype, slots.index, positions)
    return gated_norm(y, qkvz, weights.norm, weights.eps, k_heads, k_dim)


def _check_spans(spans: tuple[Span, ...], rows: int, padded: bool) -> None:
    inside = all(span.start >= 0 and span.stop <= rows for span in spans)
    if not inside or (not padded and sum(span.rows for span in spans) != rows):
        bounds = [(span.start, span.stop) for span in spans]
        raise ValueError(f"gated_delta_mixer: spans {bounds} do not make up the {rows} rows of qkvz")


def _check(qkvz: Tensor, ba: Tensor, weights: DeltaWeights, conv: Tensor, state: Tensor) -> None:
    rows = qkvz.shape[0] if qkvz.ndim else 0
    k_heads, v_heads, k_dim, v_dim = weights.k_heads, weights.v_heads, weights.k_dim, weights.v_dim
    taps, channels = weights.conv.shape
    if v_heads % k_heads or channels != 2 * k_heads * k_dim + v_heads * v_dim:
        raise ValueError(
            f"gated_delta_mixer: a convolution of {channels} channels does not fit {k_heads} key heads and {v_heads} "
            f"value heads of {v_dim}"
        )
    wanted = {
        "qkvz": (qkvz, (rows, channels + v_heads * v_dim)),
        "ba": (ba, (rows, 2 * v_heads)),
        "dt_bias": (weights.dt_bias, (v_heads,)),
        "conv": (conv, (conv.shape[0], taps, channels)),
        "state": (state, (conv.shape[0], v_heads, v_dim, k_dim)),
    }
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            raise ValueError(f"gated_delta_mixer: {name} must be {shape}, got {tuple(x.shape)}")
        if not x.is_floating_point() or (name in ("ba", "conv") and x.dtype != qkvz.dtype):
            raise ValueError(f"gated_delta_mixer: {name} must be floating, of qkvz's {qkvz.dtype}, got {x.dtype}")
        if name == "state" and x.dtype.itemsize < 4:
            raise ValueError(f"gated_delta_mixer: state must be float32, got {x.dtype}")
        if name in ("qkvz", "ba") and x.stride(-1) != 1:
            raise ValueError(
                f"gated_delta_mixer: the columns of {name} must lie side by side, got strides {x.stride()}"
            )
        if name in ("conv", "state") and not x.is_contiguous():
            raise ValueError(f"gated_delta_mixer: {name} must be contiguous, got strides {x.stride()}")
