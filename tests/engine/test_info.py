"""What `describe` reads off headers, against published figures, torch's own counts, and the model once it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from gfxlm.engine.convert import choose_formats
from gfxlm.engine.info import describe
from gfxlm.errors import UserError
from gfxlm.models import model_class
from gfxlm.models.base import CausalLM
from gfxlm.models.load import load_model
from gfxlm.nn.cache import KVFormat
from gfxlm.ops.formats import Quantization
from gfxlm.ops.ragged import ragged
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.safetensors_file import LazyTensor
from gfxlm.weights.weight import Weight
from tests.checkpoints import FAMILIES, mlx_checkpoint, transformers_checkpoint

QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B: dict[str, Any] = QWEN3_8B | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "intermediate_size": 6144,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
QWEN3_CODER_NEXT: dict[str, Any] = QWEN3_30B_A3B | {
    "model_type": "qwen3_next",
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 262144,
}


def unread() -> torch.Tensor:
    raise AssertionError("info reads no weights")


def headers(config: dict[str, Any], folder: Path) -> Checkpoint:
    """A 4-bit checkpoint of that config as its headers show it."""
    family = model_class(config["model_type"])
    formats, entry = choose_formats(family(family.Config.from_dict(config), tied=False), Quantization(64, 4))
    tensors = {}
    model = family(family.Config.from_dict(config), tied=False)
    for path, (*leading, columns) in model.matrices():
        q = formats[path]
        tensors[f"{path}.weight"] = LazyTensor((*leading, q.packed_columns(columns)), torch.uint32, unread)
        for name in ("scales", "biases"):
            tensors[f"{path}.{name}"] = LazyTensor((*leading, columns // q.group_size), torch.bfloat16, unread)
    return Checkpoint(folder, config | {"quantization": entry}, tensors)


@pytest.mark.parametrize(
    ("config", "per_token", "state", "weights", "parameters", "active"),
    [
        (QWEN3_8B, 4.26, 0.0, 4.61, 8.19, 7.57),
        (QWEN3_30B_A3B, 1.717, 0.0, 17.2, 30.5, 3.0),
        (QWEN3_CODER_NEXT, 2.18, 0.156, 44.8, 79.7, 3.56),
    ],
)
def test_published_figures(
    config: dict[str, Any],
    per_token: float,
    state: float,
    weights: float,
    parameters: float,
    active: float,
    tmp_path: Path,
) -> None:
    info = describe(headers(config, tmp_path))
    assert info.bytes_per_token / 1e9 == pytest.approx(per_token, abs=0.005)
    assert 2 * info.state_bytes / 1e9 == pytest.approx(state, abs=0.005)
    assert info.weight_bytes / 1e9 == pytest.approx(weights, rel=2e-3)
    assert info.parameters / 1e9 == pytest.approx(parameters, rel=2e-3)
    assert info.active_parameters / 1e9 == pytest.approx(active, rel=2e-2)


def test_kv_cache_of_published_shapes(tmp_path: Path) -> None:
    dense, hybrid = describe(headers(QWEN3_8B, tmp_path)), describe(headers(QWEN3_CODER_NEXT, tmp_path))
    assert dense.kv_bytes_per_token == 36 * 2 * 8 * 128 * 2
    assert (hybrid.layers, hybrid.recurrent_layers) == (48, 36)
    assert hybrid.kv_bytes_per_token == 12 * 2 * 2 * 256 * 2
    assert hybrid.quantization == "4-bit affine, group 64; 96 matrices 8-bit affine, group 64"
    assert hybrid.decode_bytes(1000) - hybrid.decode_bytes(0) == 1000 * hybrid.kv_bytes_per_token


@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 64), (4, 32), (8, 128)])
def test_quantised_kv_cache(bits: int, group_size: int, tmp_path: Path) -> None:
    info = describe(headers(QWEN3_8B, tmp_path)).with_kv(KVFormat(bits, group_size))
    per_head = 128 * bits // 8 + 128 // group_size * 2 * 2
    assert info.kv_bytes_per_token == 36 * 2 * 8 * per_head
    assert info.decode_bytes(1000) - info.decode_bytes(0) == 1000 * info.kv_bytes_per_token
    assert info.cache_bytes(10) == 10 * info.kv_bytes_per_token


def test_quantised_cache_is_the_one_that_is_made() -> None:
    checkpoint = Checkpoint.open(mlx_checkpoint("qwen3_next"))
    model = load_model(checkpoint).with_quantized_kv(4, 32)
    info = describe(checkpoint).with_kv(KVFormat(4, 32))
    assert info.cache_bytes(100) == model.make_cache(1, 100).nbytes
    with pytest.raises(UserError, match="heads of 64 features cannot be quantised in groups of 128"):
        info.with_kv(KVFormat(4, 128))


_RECIPES = {
    "llama": ("dense", "4bit", "mixed_3_6"),
    "qwen2": ("dense", "8bit"),
    "qwen3_moe": ("dense", "4bit", "3bit", "mxfp4"),
    "qwen3_next": ("dense", "4bit", "8bit-32", "nvfp4"),
}


@pytest.mark.parametrize(("family", "recipe"), [(f, r) for f, recipes in _RECIPES.items() for r in recipes])
def test_what_is_described_is_what_is_loaded(family: str, recipe: str) -> None:
    checkpoint = Checkpoint.open(mlx_checkpoint(family, recipe))
    info = describe(checkpoint)
    model = load_model(checkpoint)
    assert info.weight_bytes == pytest.approx(sum(t.nbytes for t in checkpoint.tensors.values()), rel=1e-3)
    assert info.resident_bytes == pytest.approx(resident_bytes(model), rel=1e-2)
    assert info.parameters == AutoModelForCausalLM.from_pretrained(transformers_checkpoint(family)).num_parameters()
    for context in (1, 100):
        assert info.cache_bytes(context) == model.make_cache(1, context).nbytes
    assert info.context_length == 1024
    assert info.layers == FAMILIES[family]["num_hidden_layers"]
    assert info.disk_bytes > info.weight_bytes


def resident_bytes(model: CausalLM) -> int:
    """Bytes of every weight and tensor that the modules hold."""
    total = 0
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Weight | torch.Tensor):
                total += value.nbytes
    return total


def test_a_token_passes_its_experts_only() -> None:
    info = describe(Checkpoint.open(mlx_checkpoint("qwen3_moe", "dense")))
    experts = 2 * 3 * 128 * 128
    embedding = 512 * 128
    assert info.parameters - info.active_parameters == 6 * experts + embedding
    assert info.active_bytes == 2 * info.active_parameters
    assert info.head_parameters == embedding


def test_tied_embedding_is_read_as_the_head() -> None:
    info = describe(Checkpoint.open(mlx_checkpoint("qwen2", "dense")))
    assert info.active_parameters == info.parameters
    assert info.head_parameters == 512 * 128


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_prefill_operations_are_what_torch_counts(family: str) -> None:
    checkpoint = Checkpoint.open(mlx_checkpoint(family, "dense"))
    info, model = describe(checkpoint), load_model(checkpoint)
    cache, count = model.make_cache(1, 64), FlopCounterMode(display=False)
    with count:
        positions, slots = ragged([0], [48], [0])
        hidden = model.forward(torch.arange(48), positions, slots, cache)
        model.logits(hidden[-1:])
    products = {name: n for name, n in count.get_flop_counts()["Global"].items() if "mm" in str(name)}
    attention = sum(layer.operations for layer in info.attention) * 48 * 49 // 2
    # Norms and biases are parameters without a product.
    assert info.prefill_operations(48) - attention == pytest.approx(sum(products.values()), rel=1e-2)


def test_attention_of_a_prompt_grows_with_its_depth(tmp_path: Path) -> None:
    info = describe(headers(QWEN3_8B, tmp_path))
    deeper = info.prefill_operations(2, depth=10) - info.prefill_operations(2)
    # Both tokens look at ten positions more; q·k and the weighted sum of v are two operations each.
    assert deeper == 36 * 2 * 10 * 4 * 32 * 128
    assert (
        info.prefill_operations(5)
        == info.prefill_operations(2) + info.prefill_operations(3, depth=2) - 2 * info.head_parameters
    )


def test_a_window_bounds_what_is_seen() -> None:
    sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    checkpoint = Checkpoint.open(mlx_checkpoint("llama"))
    info = describe(Checkpoint(checkpoint.folder, checkpoint.config | sliding, checkpoint.tensors))
    one = info.attention[0].kv_bytes(None)
    assert info.decode_bytes(10) - info.bytes_per_token == (4 + 10) * one
    free, windowed = describe(checkpoint), info
    lost = free.prefill_operations(6) - windowed.prefill_operations(6)
    assert lost == info.attention[0].operations * (1 + 2)


def test_weights_lie_on_a_gpu_as_they_are_stored(tmp_path: Path) -> None:
    info = describe(headers(QWEN3_8B, tmp_path), device=torch.device("meta"))
    assert info.resident_bytes == info.weight_bytes


def test_types_and_formats() -> None:
    checkpoint = Checkpoint.open(mlx_checkpoint("qwen3", "dense"))
    assert describe(checkpoint).quantization == "bfloat16"
    assert describe(checkpoint, torch.float32).weight_bytes == 2 * describe(checkpoint).weight_bytes
    assert describe(Checkpoint.open(mlx_checkpoint("qwen3", "mxfp4"))).quantization == "mxfp4"
    assert describe(Checkpoint.open(mlx_checkpoint("qwen3"))).bits_per_weight == pytest.approx(4.5, abs=0.03)


def test_contradictions_are_told(tmp_path: Path) -> None:
    checkpoint = headers(QWEN3_8B, tmp_path)
    name = "model.layers.3.mlp.down_proj.weight"
    without = {key: tensor for key, tensor in checkpoint.tensors.items() if key != name}
    with pytest.raises(UserError, match=f"{name}: missing"):
        describe(Checkpoint(tmp_path, checkpoint.config, without))
    wrong = checkpoint.tensors | {name: LazyTensor((4095, 1536), torch.uint32, unread)}
    with pytest.raises(UserError, match=rf"{name}: shape \(4095, 1536\) contradicts the config"):
        describe(Checkpoint(tmp_path, checkpoint.config, wrong))
