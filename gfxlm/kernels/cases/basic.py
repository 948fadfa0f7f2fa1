"""The small kernels at the sizes that models have."""

from functools import partial

import torch
from torch import Tensor

from gfxlm.kernels.basic.activation import softmax, swiglu
from gfxlm.kernels.basic.filters import draw_filtered
from gfxlm.kernels.basic.norm import layer_norm, rms_norm
from gfxlm.kernels.basic.sampling import draw
from gfxlm.kernels.basic.select import select
from gfxlm.kernels.basic.slice_update import slice_update
from gfxlm.kernels.case import Call, Case

EPS = 1e-6
BF16 = torch.bfloat16


def cases() -> list[Case]:
    """Norms and activations of Qwen3-8B, Qwen3-30B-A3B and Qwen3-Coder-Next; sampling over their vocabularies."""
    return [*_norms(), *_activations(), *_sampling(), *_windows()]


def _norms() -> list[Case]:
    found = []
    for rows, width in ((1, 2048), (1, 4096), (8, 5120), (512, 2048), (2048, 4096), (1, 32768), (3, 1000), (5, 64)):
        size = 2 * rows * width
        headline = (rows, width) in ((1, 2048), (1, 4096))
        name = f"{rows}x{width}"
        found += [
            Case(f"rms_norm/{name}", partial(_rms_norm, rows, width, False, BF16), 2 * size, headline=headline),
            Case(f"add_rms_norm/{name}", partial(_rms_norm, rows, width, True, BF16), 4 * size, headline=headline),
        ]
    found += [
        Case("rms_norm/float32/1x2048", partial(_rms_norm, 1, 2048, False, torch.float32), 16384),
        Case("rms_norm/float16/32x128", partial(_rms_norm, 32, 128, False, torch.float16), 16384),
    ]
    for tokens, heads in ((1, 32), (2048, 32)):
        found.append(
            Case(f"gated_rms_norm/{tokens}x{heads}x128", partial(_gated, tokens, heads), 1024 * tokens * heads)
        )
        found.append(Case(f"l2_norm/{tokens}x{heads}x128", partial(_l2_norm, tokens, heads), 768 * tokens * heads))
    for rows, width in ((1, 4096), (5, 1000), (2, 20000)):
        found.append(Case(f"layer_norm/{rows}x{width}", partial(_layer_norm, rows, width), 4 * rows * width))
    return found


def _rms_norm(rows: int, width: int, add: bool, dtype: torch.dtype, device: torch.device) -> Call:
    x, residual = torch.randn(2, rows, width, dtype=dtype, device=device).unbind()
    weight = torch.randn(width, dtype=dtype, device=device)
    return lambda: rms_norm(x, weight, EPS, dtype, residual=residual if add else None)


def _gated(tokens: int, heads: int, device: torch.device) -> Call:
    y = torch.randn(tokens, heads, 128, device=device)
    z = torch.randn(tokens, heads // 2, 768, dtype=BF16, device=device)[..., 512:].unflatten(-1, (2, 128))
    weight = torch.randn(128, dtype=BF16, device=device)
    return lambda: rms_norm(y, weight, EPS, torch.float32, gate=z.reshape(tokens, heads, 128))


def _l2_norm(tokens: int, heads: int, device: torch.device) -> Call:
    x = torch.randn(tokens, 2 * heads, 128, dtype=BF16, device=device)[:, :heads]
    return lambda: rms_norm(x, None, EPS, torch.float32, mean=False)


def _layer_norm(rows: int, width: int, device: torch.device) -> Call:
    x = torch.randn(rows, width, dtype=BF16, device=device)
    weight, bias = torch.randn(2, width, dtype=BF16, device=device).unbind()
    return lambda: layer_norm(x, weight, bias, EPS, BF16)


def _activations() -> list[Case]:
    found = []
    for rows, width in ((1, 128), (2048, 512), (3, 8192), (2, 151_936)):
        found.append(Case(f"softmax/{rows}x{width}", partial(_softmax, rows, width), 4 * rows * width))
    for rows, width in ((1, 12288), (2048, 12288), (512, 512), (30, 100)):
        found.append(Case(f"swiglu/{rows}x{width}", partial(_swiglu, rows, width), 6 * rows * width))
    return found


def _softmax(rows: int, width: int, device: torch.device) -> Call:
    x = torch.randn(rows, width, dtype=BF16, device=device)
    return lambda: softmax(x, BF16)


def _swiglu(rows: int, width: int, device: torch.device) -> Call:
    gate, x = torch.randn(rows, 2 * width, dtype=BF16, device=device).chunk(2, -1)
    return lambda: swiglu(gate, x, BF16)


def _sampling() -> list[Case]:
    found = []
    for rows, vocab, dtype in ((1, 151_936, BF16), (64, 151_936, BF16), (1, 248_320, torch.float32), (3, 1000, BF16)):
        size = rows * vocab * dtype.itemsize
        name = f"{rows}x{vocab}/{str(dtype).removeprefix('torch.')}"
        headline = rows == 1 and dtype == BF16
        found += [
            Case(f"greedy/{name}", partial(_greedy, rows, vocab, dtype), size, headline=headline),
            Case(f"draw/{name}", partial(_draw, rows, vocab, dtype, False), size),
            Case(f"draw_filtered/{name}", partial(_draw, rows, vocab, dtype, True), size, headline=headline),
        ]
    for rows, width in ((4096, 128), (7, 5000)):
        found.append(Case(f"argmin/{rows}x{width}", partial(_argmin, rows, width), 2 * rows * width))
    return found


def _greedy(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Call:
    logits = torch.randn(rows, vocab, device=device).to(dtype)
    return lambda: select(logits, finite=True)


def _argmin(rows: int, width: int, device: torch.device) -> Call:
    x = torch.randn(rows, width, dtype=BF16, device=device)
    return lambda: select(x, smallest=True)


def _draw(rows: int, vocab: int, dtype: torch.dtype, filtered: bool, device: torch.device) -> Call:
    logits = (5 * torch.randn(rows, vocab, device=device)).to(dtype)
    fp32, int64 = _wishes(rows, device)
    slots = torch.arange(rows, device=device)
    return lambda: (draw_filtered if filtered else draw)(logits, fp32, int64, slots, slots)


def _wishes(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The sampler's tables, every slot of temperature 0.7 with top_p 0.95, top_k 20 and no min_p."""
    fp32 = torch.zeros(rows, 8, device=device)
    fp32[:, 0], fp32[:, 1], fp32[:, 2] = 0.7, 0.95, -torch.inf
    int64 = torch.ones(rows, 6, dtype=torch.int64, device=device)
    int64[:, 1] = 20
    return fp32, int64


def _windows() -> list[Case]:
    found = []
    for dtype, reduce, moved in (
        (BF16, None, True),
        (BF16, "sum", False),
        (torch.float32, "max", True),
        (torch.uint8, "prod", False),
        (torch.int64, "min", True),
    ):
        kind = f"{str(dtype).removeprefix('torch.')}/{reduce or 'replace'}"
        found.append(Case(f"slice_update/{kind}", partial(_window, dtype, reduce, moved), 8 * 7 * 128 * dtype.itemsize))
    return found


def _window(dtype: torch.dtype, reduce: str | None, moved: bool, device: torch.device) -> Call:
    x = torch.zeros(8, 1024, 128, dtype=dtype, device=device)
    update = torch.ones(7, 8, 128, dtype=dtype, device=device).transpose(0, 1)
    start = torch.full((1,), 100, device=device)
    if moved:
        return lambda: slice_update(x[:, :7], update, reduce, start, (1017,), (128,))
    return lambda: slice_update(x[:, 100:107], update, reduce)
