"""The experts' grouped products against the sum over experts written out in float64."""

import pytest
import torch
from torch import Tensor

from gfxlm.kernels.moe.grouped import Stack, expert_mlp_prefill, grouped_matmul
from gfxlm.kernels.tuning import override
from tests.kernels.linear.test_wide import AFFINE4, packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = {"unpack": "plain", "block_n": 64, "block_m": 16, "block_k": 64, "num_warps": 4, "num_stages": 2}
Format = tuple[int, int, str]


def reference(
    x: Tensor, experts: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, added: Tensor
) -> tuple[Tensor, Tensor]:
    """The result in float64 and the size of what it is a sum of."""
    y, size = added.double(), added.double().abs()
    for slot in range(experts.shape[1]):
        expert = experts[:, slot]
        known = ((expert >= 0) & (expert < gate_up.shape[0]))[:, None]
        expert = expert.clamp(0, gate_up.shape[0] - 1)
        gate, up = torch.einsum("td,tnd->tn", x.double(), gate_up[expert]).chunk(2, -1)
        gate_size, up_size = torch.einsum("td,tnd->tn", x.double().abs(), gate_up[expert].abs()).chunk(2, -1)
        silu = torch.nn.functional.silu(gate)
        # SiLU is no steeper than 1.1: how far a relative change of each product moves h.
        h, h_size = silu * up, 1.1 * gate_size * up.abs() + silu.abs() * up_size + (silu * up).abs()
        weight = scores[:, slot, None].double() * known
        y = y + weight * torch.einsum("ti,tdi->td", h, down[expert])
        size = size + weight * torch.einsum("ti,tdi->td", h_size + h.abs(), down[expert].abs())
    return y, size


def check(
    tokens: int,
    k: int,
    sizes: tuple[int, int, int],
    formats: tuple[Format, Format],
    dtype: torch.dtype,
    experts: Tensor,
    *,
    tile: dict[str, object] | None = None,
    added: bool = True,
) -> None:
    num_experts, hidden, inner = sizes
    gate_up, exact_gate_up = scaled((num_experts, 2 * inner, hidden), formats[0], dtype)
    down, exact_down = scaled((num_experts, hidden, inner), formats[1], dtype)
    x = torch.randn(tokens, hidden, dtype=dtype, device=DEVICE)
    scores = torch.rand(tokens, k, device=DEVICE)
    shared, residual = torch.randn(2, tokens, hidden, dtype=dtype, device=DEVICE).unbind() if added else (None, None)
    extra = torch.zeros_like(x).double() if shared is None or residual is None else shared.double() + residual.double()
    if tile is None:
        y = expert_mlp_prefill(x, experts, scores, gate_up, down, shared=shared, residual=residual)
    else:
        with override("grouped", tile):
            y = expert_mlp_prefill(x, experts, scores, gate_up, down, shared=shared, residual=residual)
    expected, size = reference(x, experts, scores, exact_gate_up, exact_down, extra)
    # Rounded on the way, besides the result: weights, h, and each expert's row.
    unit = torch.finfo(dtype).eps / 2
    assert ((y.double() - expected).abs() <= unit * expected.abs() + (unit + 2e-6) * size).all()


def scaled(shape: tuple[int, ...], quantization: Format, dtype: torch.dtype) -> tuple[Stack, Tensor]:
    """A stack, and its numbers; "dense" is no quantisation."""
    if quantization[2] == "dense":
        dense = (torch.randn(shape, device=DEVICE) * shape[-1] ** -0.5).to(dtype)
        return dense, dense.double()
    return packed(shape, quantization, dtype)


def chosen(tokens: int, k: int, low: int, high: int) -> Tensor:
    return torch.randint(low, high, (tokens, k), device=DEVICE)


def test_all_experts() -> None:
    check(20, 3, (5, 192, 96), ((32, 4, "affine"), (32, 4, "affine")), torch.bfloat16, chosen(20, 3, 0, 5))


@pytest.mark.parametrize(
    ("formats", "dtype"),
    [
        (((32, 3, "affine"), (64, 6, "affine")), torch.bfloat16),
        (((64, 2, "affine"), (64, 8, "affine")), torch.float16),
        (((32, 4, "mxfp4"), (32, 8, "mxfp8")), torch.bfloat16),
        (((16, 4, "nvfp4"), (32, 5, "affine")), torch.float32),
        (((0, 16, "dense"), (0, 16, "dense")), torch.bfloat16),
    ],
)
def test_formats_may_differ(formats: tuple[Format, Format], dtype: torch.dtype) -> None:
    check(9, 2, (4, 256, 64), formats, dtype, chosen(9, 2, 0, 4))


@pytest.mark.parametrize("unpack", ["plain", "sums"])
def test_unpacking(unpack: str) -> None:
    tile = {**TILE, "unpack": unpack}
    check(12, 2, (3, 256, 128), (AFFINE4, AFFINE4), torch.float16, chosen(12, 2, 0, 3), tile=tile)


def test_one_expert_gets_every_row() -> None:
    check(25, 2, (3, 128, 64), (AFFINE4, AFFINE4), torch.float16, chosen(25, 2, 1, 2), added=False)


def test_experts_out_of_range_count_as_zero() -> None:
    check(10, 3, (4, 128, 64), (AFFINE4, AFFINE4), torch.float16, chosen(10, 3, -2, 7))


def test_columns_that_no_tile_divides() -> None:
    tile = {**TILE, "block_k": 256}
    check(5, 2, (3, 320, 160), ((32, 4, "affine"), (32, 4, "affine")), torch.float16, chosen(5, 2, 0, 3), tile=tile)


def test_no_tokens() -> None:
    stack, _ = scaled((2, 128, 64), AFFINE4, torch.float16)
    down, _ = scaled((2, 64, 64), AFFINE4, torch.float16)
    x = torch.empty(0, 64, dtype=torch.float16, device=DEVICE)
    y = expert_mlp_prefill(x, chosen(0, 2, 0, 2), torch.empty(0, 2, device=DEVICE), stack, down)
    assert y.shape == (0, 64)


def test_grouped_matmul() -> None:
    stack, exact = scaled((4, 50, 192), AFFINE4, torch.float16)
    x, experts = torch.randn(11, 192, dtype=torch.float16, device=DEVICE), chosen(11, 2, -1, 5)
    y = grouped_matmul(x, experts, stack)
    known = ((experts >= 0) & (experts < 4))[..., None]
    rows = exact[experts.clamp(0, 3)]
    expected = torch.einsum("tk,tjnk->tjn", x.double(), rows) * known
    size = torch.einsum("tk,tjnk->tjn", x.double().abs(), rows.abs())
    unit = torch.finfo(torch.float16).eps / 2
    assert ((y.double() - expected).abs() <= unit * expected.abs() + (unit + 2e-6) * size).all()
    assert (y[~known.expand_as(y)] == 0).all()
