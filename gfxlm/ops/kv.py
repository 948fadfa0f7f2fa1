"""Keys and values of a cache: written from the rows of a batch, read back for plain attention.

A store is (slots, max_context, heads, D), a tensor or `Quantized`. With `pages`, int32 (slots, n), it is (pages, page
size, heads, D): position p of a slot lies in page `pages[slot, p // page_size]` at `p % page_size`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.kernels.attention.store import Quantized, Store
from gfxlm.kernels.layout import adjacent
from gfxlm.ops._common import check_devices, on_gpu
from gfxlm.ops.formats import unpack_codes
from gfxlm.ops.normalization import rms_norm
from gfxlm.ops.quantized import quantize
from gfxlm.ops.ragged import Slots, check_slots
from gfxlm.ops.rotary import rotate


def write_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Store,
    v_cache: Store,
    positions: Tensor,
    slots: Slots,
    *,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    traditional: bool = False,
    pages: Tensor | None = None,
) -> Tensor:
    """Norm the heads of q and k, turn them, and store k and v: what lies between a q, k, v product and attention.

    q is (N, Hq, D), k (N, Hkv, D) and v (N, Hkv, Dv), of the caches' type; the result is q, normed and turned. norms
    are the weights of q's and k's RMSNorm, (D,) of the same type; cos and sin are float32 (N, 1, rotary dims / 2), as
    for `rotate`. `positions` is int64 (N,). On a GPU a row with a negative slot, which fills up a batch, is not stored.

    ValueError if shapes or types do not fit.
    """
    _check_rows(k, v, k_cache, v_cache, positions, slots, pages)
    if q.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.dtype != k.dtype:
        raise ValueError(f"write_qkv: q {q.dtype} {tuple(q.shape)} does not fit k {k.dtype} {tuple(k.shape)}")
    for name, weight in zip(("q_norm", "k_norm"), norms or (), strict=False):
        if weight.shape != q.shape[2:] or weight.dtype != q.dtype:
            wanted = f"{q.dtype} ({q.shape[2]},)"
            raise ValueError(f"write_qkv: {name} must be {wanted}, got {weight.dtype} {tuple(weight.shape)}")
    half = cos.shape[-1] if cos.ndim else 0
    if cos.shape != (q.shape[0], 1, half) or sin.shape != cos.shape or 2 * half > q.shape[2]:
        raise ValueError(
            f"write_qkv: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be ({q.shape[0]}, 1, n), "
            f"with 2 n at most {q.shape[2]}"
        )
    if not cos.dtype == sin.dtype == torch.float32:
        raise ValueError(f"write_qkv: cos and sin must be float32, got {cos.dtype} and {sin.dtype}")
    q_norm, k_norm = norms or (None, None)
    check_devices("write_qkv", q=q, k=k, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm)
    if on_gpu(q):
        from gfxlm.kernels.attention.write import write

        angles = (cos.reshape(-1, half), sin.reshape(-1, half))
        written = write(
            adjacent(q), adjacent(k), adjacent(v), k_cache, v_cache, positions, slots.index,
            weights=norms, eps=eps, angles=angles, traditional=traditional, pages=pages,
        )  # fmt: skip
        assert written is not None
        return written
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    q, k = (rotate(x, cos, sin, traditional=traditional) for x in (q, k))
    write_rows(k_cache, k, positions, slots.index, pages)
    write_rows(v_cache, v, positions, slots.index, pages)
    return q


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Store,
    v_cache: Store,
    positions: Tensor,
    slots: Slots,
    *,
    pages: Tensor | None = None,
) -> None:
    """Store rows as they are: k (N, Hkv, D) and v (N, Hkv, Dv), of the caches' type, at their slots and positions.

    On a GPU a row with a negative slot is not stored. ValueError if shapes or types do not fit.
    """
    _check_rows(k, v, k_cache, v_cache, positions, slots, pages)
    if on_gpu(k):
        from gfxlm.kernels.attention.write import write

        write(None, adjacent(k), adjacent(v), k_cache, v_cache, positions, slots.index, pages=pages)
        return
    write_rows(k_cache, k, positions, slots.index, pages)
    write_rows(v_cache, v, positions, slots.index, pages)


def read(store: Store, slot: int, first: int, last: int, pages: Tensor | None = None) -> Tensor:
    """Positions first ... last - 1 of a slot, (last - first, heads, D), in the store's type."""
    if pages is not None:
        size = store.shape[1]
        numbers = _numbers(pages[slot, first // size : -(-last // size)])
        skipped = first // size * size
        parts = [x[numbers].flatten(0, 1)[first - skipped : last - skipped] for x in _tensors(store)]
    else:
        parts = [x[slot, first:last] for x in _tensors(store)]
    if not isinstance(store, Quantized):
        return parts[0]
    scales, biases = parts[1].float().unbind(-1)  # (S, heads, groups)
    codes = parts[0] if store.bits == 8 else torch.cat((parts[0] & 15, parts[0] >> 4), -1)
    groups = codes[..., : store.shape[3]].unflatten(-1, (-1, store.group_size)).float()
    return torch.addcmul(biases[..., None], groups, scales[..., None]).flatten(-2).to(store.dtype)


def _numbers(pages: Tensor) -> Tensor | slice:
    """What to index a store with for these pages: on the host, neighbours are a slice, of which no copy is made."""
    numbers = pages.tolist() if pages.device.type == "cpu" else []
    if numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return pages.long()


def some(store: Store) -> Tensor:
    """One of the tensors of a store, which all lie on one device."""
    return _tensors(store)[0]


def _tensors(store: Store) -> tuple[Tensor, ...]:
    return (store.codes, store.scales) if isinstance(store, Quantized) else (store,)


def write_rows(store: Store, rows: Tensor, positions: Tensor, index: Tensor, pages: Tensor | None) -> None:
    """Store rows (N, heads, D) at their slots and positions, in plain torch."""
    if pages is not None:
        size = store.shape[1]
        index, positions = pages[index, positions // size].long(), positions % size
    parts: tuple[Tensor, ...] = (rows,)
    if isinstance(store, Quantized):
        words, scales, biases = quantize(rows, store.group_size, store.bits)
        codes = unpack_codes(words, store.bits)
        if store.bits == 4:
            first, second = F.pad(codes, (0, 2 * store.codes.shape[3] - codes.shape[-1])).chunk(2, -1)
            codes = first | second << 4
        parts = (codes, torch.stack((scales, biases), -1))
    for tensor, part in zip(_tensors(store), parts, strict=True):
        tensor.index_put_((index, positions), part)


def _check_rows(
    k: Tensor, v: Tensor, k_cache: Store, v_cache: Store, positions: Tensor, slots: Slots, pages: Tensor | None
) -> None:
    shapes = f"k {tuple(k.shape)}, v {tuple(v.shape)}, caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
    if not k.ndim == v.ndim == 3 or not len(k_cache.shape) == len(v_cache.shape) == 4:
        raise ValueError(f"write_kv: rows must be (N, Hkv, D) and caches (slots, context, Hkv, D), got {shapes}")
    if k.shape[:2] != v.shape[:2] or k.shape[1:] != k_cache.shape[2:] or v.shape[1:] != v_cache.shape[2:]:
        raise ValueError(f"write_kv: rows, heads or head sizes differ: {shapes}")
    if not k.dtype == v.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"write_kv: types differ: {k.dtype}, {v.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    check_stores("write_kv", k_cache, v_cache, pages)
    check_slots("write_kv", k.shape[0], positions, slots)
    check_devices(
        "write_kv", k=k, v=v, k_cache=some(k_cache), v_cache=some(v_cache),
        positions=positions, index=slots.index, pages=pages,
    )  # fmt: skip


def check_stores(op: str, k_cache: Store, v_cache: Store, pages: Tensor | None) -> None:
    """ValueError unless both caches are stored alike and the page table is one."""
    kinds = [(store.bits, store.group_size) if isinstance(store, Quantized) else None for store in (k_cache, v_cache)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{op}: keys and values must be stored alike, got (bits, group size) {kinds[0]} and {kinds[1]}"
        )
    if pages is not None and (pages.ndim != 2 or pages.dtype != torch.int32 or pages.stride(1) != 1):
        raise ValueError(f"{op}: pages must be int32 (slots, n), got {pages.dtype} {tuple(pages.shape)}")
    if pages is not None and k_cache.shape[1] % 16:
        raise ValueError(f"{op}: a page must hold a multiple of 16 positions, got {k_cache.shape[1]}")
