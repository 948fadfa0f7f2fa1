"""Which kernel takes which attention on a GPU. Imports Triton: for the branches of `ops.attention` that need it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gfxlm.kernels.attention.decode import MAX_QUERIES, decode
from gfxlm.kernels.attention.prefill import prefill
from gfxlm.kernels.attention.store import Store
from gfxlm.kernels.batch import Batch, Span, batch_of
from gfxlm.kernels.launch import is_recording
from gfxlm.kernels.layout import adjacent
from gfxlm.kernels.tuning import config
from gfxlm.ops.ragged import Slots

_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Kernels count a head's distance from the first in 32 bits.
_MOST_APART = 1 << 31


def dense(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """`scaled_dot_product_attention` of checked arguments of one type; mask is 4-D."""
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    if rows == 0 or keys == 0:
        return q.new_zeros(batch, heads, rows, v.shape[3])
    plain = mask is None and sinks is None
    if plain and rows > 1 and (rows == keys or not causal):
        backend = _of_torch(q, v, rows)
        if backend is not None:
            return _torch_attention(q, k, v, scale=scale, causal=causal, backend=backend)
    if heads > 1 and any(x is not None and x.shape[1] * x.stride(1) >= _MOST_APART for x in (q, mask)):
        return _head_by_head(q, k, v, scale=scale, causal=causal, mask=mask, sinks=sinks)
    q, k, v = (adjacent(x).transpose(1, 2) for x in (q, k, v))  # (B, T, H, D)
    out = torch.empty(batch, rows, heads, v.shape[3], dtype=q.dtype, device=q.device)
    if rows == 1 and mask is None:
        positions = torch.full((batch,), keys - 1, device=q.device)
        decode(q[:, 0], k, v, out[:, 0], positions, torch.arange(batch, device=q.device), scale=scale, sinks=sinks)
    else:
        spans = tuple(Span(slot, 0, rows, keys) for slot in range(batch))
        mask = None if mask is None else mask.expand(batch, heads, rows, keys)
        prefill(q, k, v, out, batch_of(spans, q.device), scale=scale, causal=causal, mask=mask, sinks=sinks)
    return out.transpose(1, 2)


def _head_by_head(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    outputs = []
    for i in range(q.shape[1]):
        one, of_keys = slice(i, i + 1), slice(i // group, i // group + 1)
        shown = mask if mask is None or mask.shape[1] == 1 else mask[:, one]
        sink = None if sinks is None else sinks[one]
        parts = (q[:, one], k[:, of_keys], v[:, of_keys])
        outputs.append(dense(*parts, scale=scale, causal=causal, mask=shown, sinks=sink))
    return torch.cat(outputs, 1)


def cached(
    q: Tensor,
    k_cache: Store,
    v_cache: Store,
    positions: Tensor,
    slots: Slots,
    *,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    gate: Tensor | None,
    pages: Tensor | None,
) -> Tensor:
    """`cached_attention` of checked arguments.

    Sequences of few rows are decoded: their lengths come from `positions`. The spans of all others say their lengths.
    In a batch that is recorded nobody knows which are which, and one kernel takes all.
    """
    q = adjacent(q)
    gate = None if gate is None else adjacent(gate)

    def prefilled(batch: Batch) -> None:
        prefill(
            q[None], k_cache, v_cache, out[None], batch, scale=scale, window=window, sinks=sinks, gate=gate, pages=pages
        )

    if slots.batch is not None:
        out = torch.empty(q.shape[0], q.shape[1], v_cache.shape[3], dtype=q.dtype, device=q.device)
        prefilled(slots.batch)
        return out
    spans = [span for span in slots.spans if span.rows]
    covered = sum(span.rows for span in spans) == q.shape[0]
    allocate = torch.empty if covered else torch.zeros
    out = allocate(q.shape[0], q.shape[1], v_cache.shape[3], dtype=q.dtype, device=q.device)
    long: list[Span] = []
    for run in _alike(spans):
        queries, rows = run[0].rows, slice(run[0].start, run[-1].stop)
        if queries > MAX_QUERIES:
            long += run
            continue
        decode(
            q[rows], k_cache, v_cache, out[rows], positions[rows], slots.index[rows], scale=scale, queries=queries,
            window=window, sinks=sinks, gate=None if gate is None else gate[rows], pages=pages,
        )  # fmt: skip
    rest = []
    for span in long:
        rows, count = slice(span.start, span.stop), span.rows
        backend = None
        if isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor) and sinks is None and pages is None:
            whole = count == span.context and (window is None or window >= count)
            backend = _of_torch(q, v_cache, count) if whole else None
        if backend is None:
            rest.append(span)
            continue
        assert isinstance(k_cache, Tensor)
        assert isinstance(v_cache, Tensor)
        given = (q[rows], k_cache[span.slot, :count], v_cache[span.slot, :count])
        heads_first = [x.transpose(0, 1)[None] for x in given]
        one = _torch_attention(*heads_first, scale=scale, causal=True, backend=backend)[0].transpose(0, 1)
        out[rows] = one if gate is None else one.float() * torch.sigmoid(gate[rows].float())
    prefilled(batch_of(tuple(rest), q.device))
    return out


def _alike(spans: Sequence[Span]) -> list[list[Span]]:
    """Neighbours with the same number of rows, taken together."""
    starts = [0]
    for i in range(1, len(spans)):
        last, span = spans[i - 1], spans[i]
        if last.stop != span.start or last.rows != span.rows:
            starts.append(i)
    return [list(spans[a:b]) for a, b in zip(starts, [*starts[1:], len(spans)], strict=True) if b > a]


def _of_torch(q: Tensor, v: Tensor, rows: int) -> str | None:
    """Which of torch's kernels does all of `rows` positions better, by the table.

    cuDNN plans for each new length for tens of milliseconds: the table asks whether a length is `even`, a multiple of
    1024, which few are. None while launches are recorded, for torch's would be missed.
    """
    if is_recording() or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] != v.shape[-1]:
        return None
    backend: str | None = config("attention", q.device, rows=rows, even=rows % 1024 == 0)["torch"]
    return backend


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, backend: str) -> Tensor:
    with sdpa_kernel(_BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
