"""Attention and the write of its caches: those of three Qwen models, and one shape of every other kind."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gfxlm.kernels.attention.angles import angles
from gfxlm.kernels.attention.decode import decode
from gfxlm.kernels.attention.prefill import prefill
from gfxlm.kernels.attention.store import Quantized, Store, row_bytes
from gfxlm.kernels.attention.write import write
from gfxlm.kernels.batch import Span, batch_of
from gfxlm.kernels.case import Call, Case

_BYTES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}


@dataclass(frozen=True, slots=True)
class _Model:
    """Heads of queries, heads of keys, their size, and how many of their features turn."""

    name: str
    heads: int
    kv_heads: int
    size: int
    rotary: int
    gated: bool = False


QWEN3_8B = _Model("32x8x128", 32, 8, 128, 128)
QWEN3_30B = _Model("32x4x128", 32, 4, 128, 128)
CODER_NEXT = _Model("16x2x256", 16, 2, 256, 64, gated=True)
SMALL = _Model("12x4x64", 12, 4, 64, 64)
ODD = _Model("10x2x80", 10, 2, 80, 32)
_REAL = (QWEN3_8B, QWEN3_30B, CODER_NEXT)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a case has besides its model's sizes."""

    name: str = "bf16"
    dtype: torch.dtype = torch.bfloat16
    bits: int = 16
    window: int | None = None
    sinks: bool = False
    mask: torch.dtype | None = None
    page: int = 0


PLAIN = _Kind()
KINDS = (
    _Kind("fp16-window-sinks", torch.float16, window=100, sinks=True),
    _Kind("fp32", torch.float32),
    _Kind("kv8", bits=8),
    _Kind("kv4", bits=4),
    _Kind("kv4-fp16", torch.float16, bits=4),
    _Kind("pages", page=64),
)
MASKS = (_Kind("shown", mask=torch.bool), _Kind("added", mask=torch.bfloat16))


def cases() -> list[Case]:
    """All of them."""
    found = []
    for model in _REAL:
        headline = model is not QWEN3_30B
        found += [_prefill(model, PLAIN, 8192, headline), _prefill(model, PLAIN, 512)]
        found += [_decode(model, PLAIN, 1, 32768, headline), _decode(model, PLAIN, 8, 4096)]
        found += [_decode(model, PLAIN, 256, 4096), _decode(model, PLAIN, 4, 4096, queries=8)]
        found += [_write(model, PLAIN, 1, headline), _write(model, PLAIN, 2048)]
    for kind in KINDS:
        for model in (CODER_NEXT, QWEN3_8B):
            found += [_prefill(model, kind, 2048), _decode(model, kind, 1, 32768), _write(model, kind, 1)]
    for model in (SMALL, ODD):
        for kind in (PLAIN, *KINDS[:2]):
            found += [_prefill(model, kind, 300), _decode(model, kind, 3, 1000), _write(model, kind, 3)]
    found += [_prefill(model, kind, 300) for kind in MASKS for model in (QWEN3_8B, CODER_NEXT, ODD)]
    return [*found, Case("attention_angles/64/m1", _make_angles, nbytes=8 + 4 * 64 * 3)]


def _prefill(model: _Model, kind: _Kind, rows: int, headline: bool = False) -> Case:
    flops = 2 * model.heads * model.size * rows * rows * (1 if kind.mask is None else 2)
    make = partial(_make_prefill, model, kind, rows)
    return Case(f"attention_prefill/{model.name}/{kind.name}/t{rows}", make, flops=flops, headline=headline)


def _decode(model: _Model, kind: _Kind, batch: int, keys: int, headline: bool = False, queries: int = 1) -> Case:
    bits = 8 * _BYTES[kind.dtype] if kind.bits == 16 else kind.bits + 16 * _BYTES[kind.dtype] / 64
    read = min(keys, kind.window or keys)
    nbytes = int(2 * batch * read * model.kv_heads * model.size * bits / 8)
    name = f"attention_decode/{model.name}/{kind.name}/n{batch}-{keys}" + (f"-q{queries}" if queries > 1 else "")
    return Case(name, partial(_make_decode, model, kind, batch, keys, queries), nbytes=nbytes, headline=headline)


def _write(model: _Model, kind: _Kind, rows: int, headline: bool = False) -> Case:
    features = model.size * (model.heads + 2 * model.kv_heads)
    name = f"qkv/{model.name}/{kind.name}/m{rows}"
    nbytes = 2 * rows * features * _BYTES[kind.dtype]
    return Case(name, partial(_make_write, model, kind, rows), nbytes=nbytes, headline=headline)


def _store(model: _Model, kind: _Kind, slots: int, keys: int, device: torch.device) -> tuple[Store, Tensor | None]:
    """A cache, and its page table if it has one."""
    pages = None
    if kind.page:
        each = -(-keys // kind.page)
        pages = torch.arange(slots * each, dtype=torch.int32, device=device).view(slots, each)
        slots, keys = slots * each, kind.page
    shape = (slots, keys, model.kv_heads)
    if kind.bits == 16:
        return torch.randn(*shape, model.size, device=device).to(kind.dtype), pages
    codes = torch.randint(0, 256, (*shape, row_bytes(model.size, kind.bits)), dtype=torch.uint8, device=device)
    scales = torch.rand(*shape, model.size // 64, 2, device=device).mul(0.01).to(kind.dtype)
    return Quantized(codes, scales, kind.bits, 64), pages


def _rows(model: _Model, kind: _Kind, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and gate as a product leaves them."""
    parts = [model.heads * model.size * (2 if model.gated else 1), *[model.kv_heads * model.size] * 2]
    q, k, v = torch.randn(rows, sum(parts), device=device).to(kind.dtype).split(parts, -1)
    q = q.unflatten(-1, (model.heads, -1))
    gate = q[..., model.size :] if model.gated else None
    return q[..., : model.size], k.unflatten(-1, (model.kv_heads, -1)), v.unflatten(-1, (model.kv_heads, -1)), gate


def _sinks(model: _Model, kind: _Kind, device: torch.device) -> Tensor | None:
    return torch.randn(model.heads, device=device).to(kind.dtype) if kind.sinks else None


def _make_prefill(model: _Model, kind: _Kind, rows: int, device: torch.device) -> Call:
    q, _, _, gate = _rows(model, kind, rows, device)
    (keys, pages), (values, _) = (_store(model, kind, 1, rows, device) for _ in range(2))
    out = torch.empty(1, rows, model.heads, model.size, dtype=kind.dtype, device=device)
    mask = None
    if kind.mask is not None:
        mask = (torch.rand(1, 1, rows, rows, device=device) - 0.5).to(kind.mask).expand(1, model.heads, rows, rows)
    return partial(
        prefill, q.contiguous()[None], keys, values, out, batch_of((Span(0, 0, rows, rows),), device),
        scale=model.size**-0.5, causal=mask is None, window=kind.window, mask=mask,
        sinks=_sinks(model, kind, device), gate=gate, pages=pages,
    )  # fmt: skip


def _make_decode(model: _Model, kind: _Kind, batch: int, keys: int, queries: int, device: torch.device) -> Call:
    q, _, _, gate = _rows(model, kind, batch * queries, device)
    (k, pages), (v, _) = (_store(model, kind, batch, keys, device) for _ in range(2))
    q = q.contiguous()
    positions = torch.arange(keys - queries, keys, device=device).repeat(batch)
    slots = torch.arange(batch, device=device).repeat_interleave(queries)
    return partial(
        decode, q, k, v, torch.empty_like(q), positions, slots, scale=model.size**-0.5,
        queries=queries, window=kind.window, sinks=_sinks(model, kind, device), gate=gate, pages=pages,
    )  # fmt: skip


def _make_write(model: _Model, kind: _Kind, rows: int, device: torch.device) -> Call:
    q, k, v, _ = _rows(model, kind, rows, device)
    (keys, pages), (values, _) = (_store(model, kind, 1, max(rows, 128), device) for _ in range(2))
    weight = torch.randn(model.size, device=device).to(kind.dtype)
    angle = torch.rand(rows, model.rotary // 2, device=device)
    positions, slots = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    return partial(
        write, q, k, v, keys, values, positions, slots,
        weights=(weight, weight), eps=1e-6, angles=(angle, angle), pages=pages,
    )  # fmt: skip


def _make_angles(device: torch.device) -> Call:
    return partial(angles, torch.arange(1, device=device), torch.rand(64, device=device), 1.0, 1.0)
