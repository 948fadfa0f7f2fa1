"""Attention with grouped queries: over given keys, and over the rows of a flattened batch with a KV cache.

`reference` says what is meant. On the CPU torch's fused kernel does the work, except where there are sinks; on a GPU
kernels of our own do, except where the architecture's table names a kernel of torch's that is faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.kernels.attention.store import Store
from gfxlm.kernels.batch import Span
from gfxlm.ops._common import check_devices, on_gpu, wants_gradient, widen
from gfxlm.ops.kv import check_stores, read, some
from gfxlm.ops.ragged import Slots, check_slots

# Up to this many query rows, the query heads that share a key head are laid out as rows of one head: the CPU
# kernel then reads each key once, which is worth a factor of up to 16 for one row, and nothing from 32 on.
_FOLDED_ROWS = 16
# The reference holds at most this many scores at a time.
_REFERENCE_SCORES = 1 << 24
# What the kernels know; all else on a GPU is torch's.
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KERNEL_HEAD_SIZE = 256


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | str | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q kᵀ + mask) v, with the softmax in float32.

    q is (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), with Hq a multiple of Hkv; the result is (B,
    Hq, Tq, Dv) in the type they promote to. mask is None, "causal" (the last query sees the last key), or a
    tensor that broadcasts to (B, Hq, Tq, Tk): boolean, True where a key is seen, or added to the scores.
    sinks, (Hq,), is one more score per head that takes weight and gives no value. A query that sees no key
    gives zeros.

    ValueError if shapes do not fit, the types are not floating, mask is another string, or mask or sinks
    would widen the result's type.
    """
    dtype = _check_qkv(q, k, v)
    given = _check_mask(q, k, mask, dtype)
    causal = isinstance(mask, str)
    if sinks is not None:
        _check_sinks("scaled_dot_product_attention", sinks, q.shape[1], dtype)
    check_devices("scaled_dot_product_attention", q=q, k=k, v=v, mask=given, sinks=sinks)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if _kernel_takes(q, k, v, scale) and not wants_gradient(q, k, v, given, sinks):
        from gfxlm.ops.attention_gpu import dense

        return dense(q, k, v, scale=scale, causal=causal, mask=given, sinks=sinks)
    visible = _causal_mask(q, k) if causal else given
    causal = causal and visible is None and q.shape[2] > 1
    out = _attend(q, k, v, scale=scale, mask=visible, causal=causal, sinks=sinks)
    if visible is None:
        return out
    # torch's kernels disagree about a row that sees nothing: zeros on the CPU, the mean of v on CUDA.
    seen = visible if visible.dtype == torch.bool else visible != -torch.inf
    return out.masked_fill(~seen.any(-1, keepdim=True), 0)


def cached_attention(
    q: Tensor,
    k_cache: Store,
    v_cache: Store,
    positions: Tensor,
    slots: Slots,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    pages: Tensor | None = None,
) -> Tensor:
    """Attention of the rows of a flattened batch over the caches of their sequences.

    q is (N, Hq, D); k_cache (n_slots, max_context, Hkv, D) and v_cache (n_slots, max_context, Hkv, Dv)
    already hold these rows' keys and values, as numbers or `Quantized`; the result is (N, Hq, Dv). The row at
    position p of its slot, `positions` int64 (N,), sees the keys j with j <= p, and p - window < j if there is a
    window. sinks are as in `scaled_dot_product_attention`. A row that no span covers gives zeros. With a gate,
    (N, Hq, Dv), the result is multiplied by its sigmoid. With `pages`, int32 (slots, n), the caches are as in `ops.kv`.

    On a GPU, sequences of up to 8 rows take their slots and lengths from `slots.index` and `positions`, not from the
    spans, so that a captured call serves every length; rows with a negative slot then give zeros.

    ValueError if shapes or types do not fit or a span lies outside the batch or the caches.
    """
    _check_cached(q, k_cache, v_cache, window, sinks)
    check_slots("cached_attention", q.shape[0], positions, slots)
    check_stores("cached_attention", k_cache, v_cache, pages)
    check_devices(
        "cached_attention", q=q, k_cache=some(k_cache), v_cache=some(v_cache),
        positions=positions, index=slots.index, sinks=sinks, gate=gate, pages=pages,
    )  # fmt: skip
    if gate is not None and (gate.shape != (*q.shape[:2], v_cache.shape[3]) or gate.dtype != q.dtype):
        wanted = f"{q.dtype} {(*q.shape[:2], v_cache.shape[3])}"
        raise ValueError(f"cached_attention: gate must be {wanted}, got {gate.dtype} {tuple(gate.shape)}")
    for span in slots.spans:
        _check_span(span, q, k_cache, pages)
    if _kernel_takes(q, k_cache, v_cache, scale):
        from gfxlm.ops.attention_gpu import cached

        return cached(
            q, k_cache, v_cache, positions, slots, scale=scale, window=window, sinks=sinks, gate=gate, pages=pages
        )
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[-1])
    for span in slots.spans:
        rows = slice(span.start, span.stop)
        count = span.stop - span.start
        first = 0 if window is None else max(0, span.context - count - window + 1)
        keys, values = (read(cache, span.slot, first, span.context, pages) for cache in (k_cache, v_cache))
        whole = count == span.context and (window is None or window >= count)
        mask = None
        if count > 1 and not whole:
            mask = _seen(positions[rows], torch.arange(first, span.context, device=q.device), window)
        out[rows] = _attend(
            q[rows].transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            scale=scale,
            mask=mask,
            causal=whole and count > 1,
            sinks=sinks,
        )[0].transpose(0, 1)
    return out if gate is None else (out.float() * torch.sigmoid(gate.float())).to(out.dtype)


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention as written. Shapes as in `scaled_dot_product_attention`; Tk > 0, mask None or 4-D.

    The running maximum starts at the finite minimum, so that a row of -inf has weights of zero, not NaN.
    """
    kv_heads, rows = k.shape[1], q.shape[2]
    scores = _unfold(_fold(widen(q) * scale, kv_heads) @ widen(k).mT, rows)  # (B, Hq, Tq, Tk)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    sink = None if sinks is None else widen(sinks).view(-1, 1, 1)
    if sink is not None:
        peak = torch.maximum(peak, sink)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - peak).exp()
    weights = weights / total.masked_fill(total == 0, 1)
    return _unfold(_fold(weights, kv_heads) @ widen(v), rows).to(q.dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, causal: bool, sinks: Tensor | None
) -> Tensor:
    """`reference`, the fastest way. `causal` stands for the mask of that name where Tq == Tk."""
    rows, keys = q.shape[2], k.shape[2]
    if rows == 0 or keys == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    if sinks is not None:
        if causal:
            mask = _seen(torch.arange(rows, device=q.device), torch.arange(keys, device=q.device), None)
        return _reference_in_blocks(q, k, v, scale=scale, mask=mask, sinks=sinks)
    if causal or rows > _FOLDED_ROWS:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)
    if mask is not None:
        mask = _fold(mask.expand(-1, q.shape[1], rows, -1), k.shape[1])
    return _unfold(F.scaled_dot_product_attention(_fold(q, k.shape[1]), k, v, mask, scale=scale), rows)


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, T, n) to (B, Hkv, Hq / Hkv * T, n): the query heads of one key head as rows."""
    return torch.unflatten(x, 1, (kv_heads, -1)).flatten(2, 3)


def _unfold(x: Tensor, rows: int) -> Tensor:
    """The inverse of `_fold`, for T = rows."""
    return torch.unflatten(x, 2, (-1, rows)).flatten(1, 2)


def _reference_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    k, v = widen(k), widen(v)
    step = max(1, _REFERENCE_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    blocks = []
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        blocks.append(reference(q[:, :, rows], k, v, scale=scale, mask=part, sinks=sinks))
    return torch.cat(blocks, 2)


def _seen(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which of the key positions each row's position sees, (1, 1, rows, keys)."""
    position = positions.unsqueeze(-1)
    seen = keys <= position
    if window is not None:
        seen = seen & (keys > position - window)
    return seen[None, None]


def _causal_mask(q: Tensor, k: Tensor) -> Tensor | None:
    """The mask of that name as a 4-D tensor; None where there is nothing to hide or Tq == Tk says it all."""
    rows, keys = q.shape[2], k.shape[2]
    if rows == keys or rows == 1:
        return None
    ends = torch.arange(keys - rows, keys, device=q.device)
    return _seen(ends, torch.arange(keys, device=q.device), None)


def _kernel_takes(q: Tensor, k: Store, v: Store, scale: float) -> bool:
    """Whether our kernels do this."""
    fits = q.dtype in _KERNEL_DTYPES and max(k.shape[3], v.shape[3]) <= _KERNEL_HEAD_SIZE
    return on_gpu(q) and fits and scale > 0


def _check_mask(q: Tensor, k: Tensor, mask: Tensor | str | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that is a tensor, with 4 dimensions."""
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"scaled_dot_product_attention: mask must be 'causal' or a tensor, got {mask!r}")
    if mask is None or isinstance(mask, str):
        return None
    full = (*q.shape[:3], k.shape[2])
    if mask.ndim > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(
            f"scaled_dot_product_attention: mask {tuple(mask.shape)} does not broadcast to {full}, "
            "which is (B, Hq, Tq, Tk)"
        )
    if mask.dtype != torch.bool and torch.promote_types(mask.dtype, dtype) != dtype:
        raise ValueError(f"scaled_dot_product_attention: mask of {mask.dtype} would widen the result's type {dtype}")
    mask = mask if mask.dtype == torch.bool else mask.to(dtype)
    return mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"scaled_dot_product_attention: q, k and v must have 4 dimensions, got {shapes}")
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1:3] != v.shape[1:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"scaled_dot_product_attention: batch, key heads, lengths or head sizes differ: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"scaled_dot_product_attention: q's heads must be a multiple of k's: {shapes}")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"scaled_dot_product_attention: q, k and v must be floating, got {dtype}")
    return dtype


def _check_sinks(op: str, sinks: Tensor, heads: int, dtype: torch.dtype) -> None:
    if sinks.shape != (heads,):
        raise ValueError(f"{op}: sinks must have shape ({heads},), got {tuple(sinks.shape)}")
    if torch.promote_types(sinks.dtype, dtype) != dtype:
        raise ValueError(f"{op}: sinks of {sinks.dtype} would widen the result's type {dtype}")


def _check_cached(q: Tensor, k_cache: Store, v_cache: Store, window: int | None, sinks: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}"
    if q.ndim != 3 or not len(k_cache.shape) == len(v_cache.shape) == 4 or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"cached_attention: q must be (N, Hq, D) and the caches (slots, context, Hkv, D), got {shapes}"
        )
    if q.shape[2] != k_cache.shape[3] or k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"cached_attention: head sizes differ, or q's heads are no multiple of k_cache's: {shapes}")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"cached_attention: types differ: {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if not q.is_floating_point():
        raise ValueError(f"cached_attention: q must be floating, got {q.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"cached_attention: window must be at least 1, got {window}")
    if sinks is not None:
        _check_sinks("cached_attention", sinks, q.shape[1], q.dtype)


def _check_span(span: Span, q: Tensor, cache: Store, pages: Tensor | None) -> None:
    slots, keys = cache.shape[:2] if pages is None else (pages.shape[0], pages.shape[1] * cache.shape[1])
    in_batch = 0 <= span.start <= span.stop <= q.shape[0]
    in_cache = 0 <= span.slot < slots and span.stop - span.start <= span.context <= keys
    if not (in_batch and in_cache):
        raise ValueError(f"cached_attention: {span} is outside q {tuple(q.shape)} or the cache {tuple(cache.shape)}")
