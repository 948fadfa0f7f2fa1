"""Unquantised float32 models against transformers, and against mlx-lm for what transformers lacks."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gfxlm.models.load import load_model
from gfxlm.weights.checkpoint import Checkpoint
from tests import checkpoints
from tests.checkpoints import FAMILIES, transformers_checkpoint

TOKENS = torch.arange(3, 75).reshape(2, 36) * 13 % 500


@pytest.fixture
def variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A checkpoint of a family with some settings changed; those that are None are left to transformers' defaults."""

    def make(family: str, **changes: Any) -> Path:
        settings = {k: v for k, v in (FAMILIES[family] | changes).items() if v is not None}
        monkeypatch.setitem(checkpoints.FAMILIES, family, settings)
        monkeypatch.setattr(checkpoints, "_ROOT", tmp_path)
        folder = transformers_checkpoint.__wrapped__(family, torch.float32)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key in (key for key, value in changes.items() if value is None):
            config.pop(key, None)
            config["rope_parameters"].pop(key, None)
        path.write_text(json.dumps(config))
        return folder

    return make


def our_logits(folder: Path) -> Tensor:
    model = load_model(Checkpoint.open(folder))
    assert model.dtype == torch.float32
    return model(TOKENS)


def transformers_logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(TOKENS).logits


def mlx_logits(folder: Path) -> Tensor:
    model, _ = mlx_lm.utils.load_model(folder)
    return torch.from_numpy(np.array(model(mx.array(TOKENS.numpy()))))


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    folder = transformers_checkpoint(family, torch.float32)
    assert_equal(our_logits(folder), transformers_logits(folder))


HEADS = [
    {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 80},
    {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 96},
    {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 128},
    {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256},
]


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "-".join(map(str, heads.values())))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_heads(family: str, heads: dict[str, int], variant: Any) -> None:
    folder = variant(family, **heads, hidden_size=heads["num_attention_heads"] * 32)
    assert_equal(our_logits(folder), transformers_logits(folder))


@pytest.mark.parametrize("hidden_size", [240, 288])
def test_head_size_that_the_config_does_not_name(hidden_size: int, variant: Any) -> None:
    folder = variant("llama", hidden_size=hidden_size, num_attention_heads=3, num_key_value_heads=None, head_dim=None)
    assert_equal(our_logits(folder), transformers_logits(folder))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": None}),
        ("llama", {"rms_norm_eps": 1e-2}),
        ("mistral", {"head_dim": 96}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen2", {"rope_theta": 1e6}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts_per_tok": 8}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"mlp_only_layers": None, "decoder_sparse_step": None}),
        ("qwen3_moe", {"norm_topk_prob": None}),
        ("qwen3_moe", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen3_next", {"full_attention_interval": 2}),
        ("qwen3_next", {"full_attention_interval": None}),
        ("qwen3_next", {"mlp_only_layers": None, "decoder_sparse_step": None}),
        ("qwen3_next", {"linear_num_key_heads": 4}),
        ("qwen3_next", {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "linear_value_head_dim": 32}),
        ("qwen3_next", {"linear_conv_kernel_dim": 2}),
        ("qwen3_next", {"partial_rotary_factor": 0.5}),
        ("qwen3_next", {"partial_rotary_factor": None}),
        ("qwen3_next", {"norm_topk_prob": None}),
        ("qwen3_next", {"norm_topk_prob": False}),
        ("qwen3_next", {"mlp_only_layers": [0, 3]}),
        ("qwen3_next", {"num_experts": 0, "num_experts_per_tok": 0}),
        ("qwen3_next", {"attention_bias": True, "tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_settings(family: str, changes: dict[str, Any], variant: Any) -> None:
    folder = variant(family, **changes)
    assert_equal(our_logits(folder), transformers_logits(folder))


SCALINGS = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 1.2},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 2},
    {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0 + i / 10 for i in range(32)]},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rope_scalings(scaling: dict[str, Any], variant: Any) -> None:
    # The prompt is longer than the original context, where transformers and mlx-lm agree on longrope.
    original = {} if scaling["rope_type"] == "linear" else {"original_max_position_embeddings": 32}
    folder = variant("llama", rope_scaling=scaling | original, max_position_embeddings=512)
    ours = our_logits(folder)
    assert_equal(ours, transformers_logits(folder))
    assert_equal(ours, mlx_logits(folder))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_traditional": True}),
        ("llama", {"rope_traditional": True, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
        ("qwen2", {"rope_traditional": True}),
        ("llama", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 1}),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 36}),
        # mlx-lm slides no window where there are no layer types, and so do we.
        ("mistral", {"sliding_window": 7}),
    ],
    ids=str,
)
def test_settings_of_mlx(family: str, changes: dict[str, Any], variant: Any) -> None:
    folder = variant(family, **changes)
    assert_equal(our_logits(folder), mlx_logits(folder))


def test_a_window_hides_what_is_behind_it(variant: Any) -> None:
    kinds = {"layer_types": ["sliding_attention", "sliding_attention"], "sliding_window": 5}
    model = load_model(Checkpoint.open(variant("llama", **kinds)))
    changed = TOKENS.clone()
    changed[:, 4] += 1
    difference = (model(TOKENS) - model(changed)).abs().amax((0, 2))
    # Two layers of a window of 5 see the token itself and 8 before it.
    assert (difference[4:13] > 0).all()
    assert (difference[13:] == 0).all()
    assert (difference[:4] == 0).all()
