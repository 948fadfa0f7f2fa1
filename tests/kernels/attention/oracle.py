"""Attention in float64, how near a kernel must come to it, and caches to try it on."""

import torch
from torch import Tensor

from gfxlm.kernels.attention.store import Quantized, Store, row_bytes
from gfxlm.ops.kv import read

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    added: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows q (T, Hq, D) over k (S, Hkv, D) and v (S, Hkv, DV): the result, and with all values positive.

    seen and added broadcast to (Hq, T, S).
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = scale * torch.einsum("thd,shd->hts", q.double(), k)
    scores = scores.masked_fill(~seen, -torch.inf)
    if added is not None:
        scores = scores + added.double()
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(-1, 1, 1).expand(*scores.shape[:2], 1)), -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[0]]
    return torch.einsum("hts,shd->thd", weights, v), torch.einsum("hts,shd->thd", weights, v.abs())


def assert_near(out: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """Two roundings to the type: of each weight, before it meets its value, and of the result."""
    rounding = torch.finfo(out.dtype).eps / 2
    if DEVICE == "cpu" and out.dtype == torch.bfloat16:
        rounding *= 2  # Triton's interpreter cuts where a GPU rounds
    wanted, spread = (x.to(out.device) for x in expected)
    error, bound = (out.double() - wanted).abs(), 1.05 * rounding * (spread + wanted.abs()) + 4e-6
    assert (error <= bound).all(), f"error {error.max():.2e}, {(error / bound).max():.2f} of the bound"


def causal(positions: Tensor, keys: int, window: int | None = None) -> Tensor:
    """Which keys rows at these positions see."""
    key = torch.arange(keys, device=positions.device)
    seen = key <= positions[:, None]
    return seen if window is None else seen & (key > positions[:, None] - window)


def exact_codes(shape: tuple[int, ...], bits: int, group_size: int, dtype: torch.dtype) -> Quantized:
    """A store whose numbers every type holds exactly, with scales of both signs."""
    *rows, features = shape
    codes = torch.randint(0, 256, (*rows, row_bytes(features, bits)), dtype=torch.uint8)
    scales = torch.randint(0, 2, (*rows, features // group_size, 1)) * 2.0 - 1
    scales = scales * 2.0 ** (1 - bits)
    return Quantized(codes.to(DEVICE), torch.cat((scales, -scales.sign()), -1).to(dtype).to(DEVICE), bits, group_size)


def store(shape: tuple[int, ...], dtype: torch.dtype, bits: int = 16, group_size: int = 32) -> Store:
    """A cache with something in it."""
    if bits == 16:
        return torch.randn(shape).to(dtype).to(DEVICE)
    return exact_codes(shape, bits, group_size, dtype)


def numbers(cache: Store, slot: int, last: int, pages: Tensor | None = None) -> Tensor:
    """The first positions of a slot."""
    return read(cache, slot, 0, last, pages)


def table(slots: int, pages: int) -> Tensor:
    """A page table in which no page is where it would be without one, the beginning of a wider one."""
    numbers = torch.randperm(slots * pages).to(torch.int32).view(slots, pages)
    return torch.cat((numbers, torch.zeros_like(numbers)), 1).to(DEVICE)[:, :pages]
