"""Rotary embeddings in every scaling, against mlx-lm's own."""

from typing import Any

import pytest
import torch
from mlx_lm.models.rope_utils import initialize_rope
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.nn.rope import RoPE
from gfxlm.ops import rotate
from gfxlm.weights.config import QuantizationMap
from gfxlm.weights.source import WeightSource
from tests.mlx_bridge import to_mlx, to_torch

LONG = [1.0 + 0.3 * i for i in range(32)]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}
LONGROPE = {"original_max_position_embeddings": 512, "long_factor": LONG, "short_factor": [1.0] * 32}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"type": "linear", "factor": 2.5},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3, by default": {"rope_type": "llama3", "factor": 8.0},
    "llama3, all waves blended": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1e6},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn, by default": {"type": "yarn", "factor": 4.0},
    "yarn, factor 1": {"type": "yarn", **YARN, "factor": 1.0},
    "yarn, mscale": {"rope_type": "yarn", **YARN, "mscale": 0.7},
    "yarn, mscale_all_dim": {"rope_type": "yarn", **YARN, "mscale_all_dim": 0.9},
    "yarn, both": {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn, betas": {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 4},
    "yarn, betas alike": {"rope_type": "yarn", **YARN, "beta_fast": 1e9, "beta_slow": 1e9},
    "deepseek_yarn": {"type": "deepseek_yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "longrope": {"rope_type": "longrope", **LONGROPE},
    "longrope, not longer": {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 4096},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "mrope": {"type": "mrope", "mrope_section": [16, 8, 8]},
    "both spellings": {"type": "linear", "rope_type": "default", "factor": 3.0},
}
DIMS, MAX_CONTEXT = 64, 4096


def ours(x: Tensor, scaling: dict[str, Any] | None, base: float, offset: int, traditional: bool) -> Tensor:
    cos, sin = RoPE(DIMS, base, scaling, MAX_CONTEXT)(torch.arange(offset, offset + len(x)))
    return rotate(x, cos, sin, traditional=traditional)


def theirs(x: Tensor, scaling: dict[str, Any] | None, base: float, offset: int, traditional: bool) -> Tensor:
    rope = initialize_rope(DIMS, base, traditional, scaling, MAX_CONTEXT)
    return to_torch(rope(to_mlx(x.transpose(0, 1)[None]), offset=offset))[0].transpose(0, 1)


@pytest.mark.parametrize("base", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_equal_mlx(name: str, base: float) -> None:
    x = torch.randn(24, 3, 80)  # 80 features, of which 64 turn
    for offset, tolerance in ((0, 2e-5), (1000, 1e-3)):
        got, wanted = (f(x, SCALINGS[name], base, offset, False) for f in (ours, theirs))
        # float32 angles: what rounding does to them grows with the position.
        assert (got - wanted).abs().max() < tolerance
        assert torch.equal(got[..., DIMS:], x[..., DIMS:])


@pytest.mark.parametrize("name", ["none", "linear", "llama3", "yarn, both"])
def test_traditional_pairs_equal_mlx(name: str) -> None:
    x = torch.randn(24, 3, DIMS)
    got, wanted = (f(x, SCALINGS[name], 10_000.0, 3, True) for f in (ours, theirs))
    assert (got - wanted).abs().max() < 5e-5
    assert (got - ours(x, SCALINGS[name], 10_000.0, 3, False)).abs().max() > 0.1


@pytest.mark.parametrize(
    "name", [name for name, scaling in SCALINGS.items() if name not in ("none", "default", "mrope")]
)
def test_scalings_differ(name: str) -> None:
    """What is compared above is not all the same."""
    x = torch.ones(24, 1, DIMS)
    plain, scaled = (ours(x, scaling, 10_000.0, 1000, False) for scaling in (None, SCALINGS[name]))
    same = ("dynamic", "yarn, factor 1")
    assert ((plain - scaled).abs().max() > 1e-3) == (name not in same)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "su"}, "type 'su' is not known"),
        ({"type": ["linear"]}, r"type \['linear'\] is not known"),
        ({"type": "linear"}, "type 'linear' needs 'factor'"),
        ({"type": "llama3"}, "type 'llama3' needs 'factor'"),
        ({"type": "yarn"}, "type 'yarn' needs 'factor'"),
        ({"type": "longrope", "long_factor": LONG}, "type 'longrope' needs 'original_max_position_embeddings'"),
        ({"type": "longrope", "original_max_position_embeddings": 512}, "type 'longrope' needs 'long_factor'"),
        (
            {"type": "longrope", **LONGROPE, "long_factor": LONG[:-1]},
            r"type 'longrope': long_factor must have 32 numbers, but has shape \(31,\)",
        ),
        ({"type": "longrope", **LONGROPE, "long_factor": 2.0}, "type 'longrope'"),
        ({"type": "longrope", **LONGROPE, "long_factor": ["1"] * 32}, "type 'longrope'"),
        ({"type": "longrope", **LONGROPE, "original_max_position_embeddings": 0}, "type 'longrope'"),
        ({"type": "longrope", **LONGROPE, "original_max_position_embeddings": 1}, "type 'longrope'"),
        ({"type": "linear", "factor": 0}, "type 'linear'"),
        ({"type": "linear", "factor": "2"}, "type 'linear'"),
        ({"type": "linear", "factor": None}, "type 'linear'"),
        ({"type": "llama3", "factor": [8]}, "type 'llama3'"),
        ({"type": "llama3", "factor": 0}, "type 'llama3'"),
        ({"type": "llama3", **LLAMA3, "low_freq_factor": 0}, "type 'llama3'"),
        ({"type": "yarn", "factor": "4"}, "type 'yarn'"),
        ({"type": "yarn", **YARN, "original_max_position_embeddings": -1}, "type 'yarn'"),
        ({"type": "yarn", **YARN, "beta_fast": 0}, "type 'yarn'"),
        ({"type": "yarn", **YARN, "mscale": {}}, "type 'yarn'"),
    ],
)
def test_scaling_that_makes_no_sense(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^rope_scaling: {message}") as caught:
        RoPE(DIMS, 10_000.0, scaling, MAX_CONTEXT)
    assert len(str(caught.value).splitlines()) == 1


def test_frequencies_go_to_the_device() -> None:
    rope = RoPE(DIMS, 10_000.0, None, MAX_CONTEXT)
    rope.load(WeightSource({}, QuantizationMap({}), dtype=torch.float32, device=torch.device("meta")))
    assert rope.freqs.device.type == "meta"
