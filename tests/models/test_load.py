"""Loading: the same model however its checkpoint is spelled, in the right types, and in memory once."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.load import load_model
from gfxlm.nn.linear import MergedLinear
from gfxlm.ops.int4_cpu import int4_applies
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.weight import DenseWeight, MergedWeight, PackedWeight, Weight
from tests.checkpoints import FAMILIES, mlx_checkpoint, transformers_checkpoint

TOKENS = torch.arange(2, 14).reshape(1, 12) * 17 % 500
FAST = int4_applies(64, torch.bfloat16)


def copied(folder: Path, into: Path) -> Path:
    return Path(shutil.copytree(folder, into / "copy"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def logits(folder: Path, **options: Any) -> Tensor:
    return load_model(Checkpoint.open(folder), **options)(TOKENS)


def transformers_4(config: dict[str, Any]) -> None:
    config |= {k: v for k, v in config.pop("rope_parameters").items() if k != "rope_type"}
    if experts := config.pop("num_local_experts", None):
        config["num_experts"] = experts


def transformers_5(config: dict[str, Any]) -> None:
    nested = config["rope_parameters"]
    for key in nested:
        config.pop(key, None)
    config["rope_scaling"] = None
    if "num_experts" in config:
        config["num_local_experts"] = config.pop("num_experts")


@pytest.mark.parametrize("spelling", [transformers_4, transformers_5])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings(family: str, spelling: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    folder = mlx_checkpoint(family, "4bit")
    edited = edit_config(copied(folder, tmp_path), spelling)
    assert json.loads((edited / "config.json").read_text()).get("rope_theta") == (
        1e4 if spelling is transformers_4 else None
    )
    assert torch.equal(logits(edited), logits(folder))


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}])
def test_rope_scaling_in_both_spellings(scaling: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(mlx_checkpoint("llama", "4bit"), tmp_path)
    plain = logits(folder)
    flat = logits(edit_config(folder, lambda config: config.update(rope_scaling=scaling)))
    nested = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    edit_config(folder, lambda config: config.update(rope_scaling=None, rope_theta=None, rope_parameters=nested))
    assert torch.equal(logits(folder), flat)
    assert not torch.equal(flat, plain)


def moved(config: dict[str, Any]) -> None:
    del config["quantization"]


def doubled(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def modeless(config: dict[str, Any]) -> None:
    for entry in (config["quantization"], *config["quantization"].values()):
        if isinstance(entry, dict):
            entry.pop("mode", None)


def wrong_at_the_top(config: dict[str, Any]) -> None:
    config["quantization"] |= {"group_size": 128, "bits": 8, "mode": "mxfp8"}


def stray_overrides(config: dict[str, Any]) -> None:
    config["quantization"] |= {"model.layers.9.mlp": {"bits": 2}, "lm_head": False, "vision": True}


def tagged(config: dict[str, Any]) -> None:
    config |= {"time_step_limit": [0.0, {"__float__": "Infinity"}], "router_jitter_noise": {"__float__": "NaN"}}


@pytest.mark.parametrize("trap", [moved, doubled, modeless, wrong_at_the_top, stray_overrides, tagged])
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_traps_of_the_quantization_entry(family: str, trap: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    folder = mlx_checkpoint(family, "4bit")
    assert torch.equal(logits(edit_config(copied(folder, tmp_path), trap)), logits(folder))


def test_override_without_a_mode_is_affine(tmp_path: Path) -> None:
    folder = mlx_checkpoint("qwen3_moe", "mxfp4")
    entry = json.loads((folder / "config.json").read_text())["quantization"]
    gate = entry["model.layers.0.mlp.gate"]
    assert entry["mode"] == "mxfp4"
    assert "mode" not in gate
    assert logits(folder).isfinite().all()
    edit_config(
        edited := copied(folder, tmp_path),
        lambda config: config["quantization"]["model.layers.0.mlp.gate"].update(bits=4),
    )
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.gate: affine, 4 bits .* contradicts the tensors"):
        logits(edited)


def merged_products(model: CausalLM) -> list[Weight]:
    return [module.weight for module in model.modules() if isinstance(module, MergedLinear)]


def test_mixed_recipe_leaves_a_wider_v_apart() -> None:
    folder = mlx_checkpoint("llama", "mixed_3_6")
    kinds = [type(weight) for weight in merged_products(load_model(Checkpoint.open(folder)))]
    assert MergedWeight in kinds
    assert PackedWeight in kinds
    # One format all over merges throughout.
    uniform = load_model(Checkpoint.open(mlx_checkpoint("llama", "4bit")))
    assert all(isinstance(weight, PackedWeight) for weight in merged_products(uniform))


@pytest.mark.parametrize(
    ("family", "recipe", "stored", "asked", "runs"),
    [
        ("llama", "dense", torch.float32, None, torch.float32),
        ("llama", "dense", torch.float16, None, torch.float16),
        ("llama", "dense", torch.bfloat16, None, torch.bfloat16),
        ("llama", "dense", torch.bfloat16, torch.float16, torch.float16),
        ("llama", "4bit", torch.float32, None, torch.float32),
        ("llama", "4bit", torch.bfloat16, None, torch.bfloat16),
        # The CPU's int4 kernel is fast in bfloat16 alone.
        ("llama", "4bit", torch.float16, None, torch.bfloat16),
        ("llama", "4bit", torch.float16, torch.float16, torch.float16),
        ("qwen3_next", "4bit", torch.float16, torch.float32, torch.float32),
        ("llama", "mxfp4", torch.float16, None, torch.bfloat16),
        ("llama", "mxfp4", torch.float32, None, torch.float32),
    ],
)
def test_dtype(family: str, recipe: str, stored: torch.dtype, asked: torch.dtype | None, runs: torch.dtype) -> None:
    folder = mlx_checkpoint(family, recipe, *(() if stored == torch.bfloat16 else (stored,)))
    model = load_model(Checkpoint.open(folder), dtype=asked)
    assert model.dtype == runs
    ours = model(TOKENS)
    assert ours.dtype == runs
    exact = logits(folder, dtype=torch.float32)
    assert (ours.float() - exact).norm() <= 8 * torch.finfo(runs).eps * exact.norm()


def test_float16_on_another_device_stays() -> None:
    assert (
        load_model(Checkpoint.open(mlx_checkpoint("llama", "4bit", torch.float16)), device="meta").dtype
        == torch.float16
    )


@pytest.mark.parametrize("most", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_run_in_the_commonest(most: torch.dtype, tmp_path: Path) -> None:
    folder = copied(mlx_checkpoint("qwen3", "dense"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    other = torch.bfloat16 if most == torch.float32 else torch.float32
    tensors = {name: t.to(other if "norm" in name or "k_proj" in name else most) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    model = load_model(Checkpoint.open(folder))
    assert model.dtype == most
    assert model(TOKENS).dtype == most
    assert {t.dtype for t in held(model)} == {most, torch.float32}  # float32: the frequencies of the positions


def test_old_names_and_shards(tmp_path: Path) -> None:
    folder = mlx_checkpoint("llama", "4bit")
    expected = logits(folder)
    old = copied(folder, tmp_path)
    (old / "model.safetensors.index.json").unlink()
    (old / "model.safetensors").rename(old / "weights.00.safetensors")
    assert torch.equal(logits(old), expected)
    names = sorted(tensors := load_file(old / "weights.00.safetensors"))
    (old / "weights.00.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, old / file)
    assert torch.equal(logits(old), expected)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (old / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(old), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_or_not(family: str) -> None:
    model = load_model(Checkpoint.open(mlx_checkpoint(family, "4bit")))
    assert model.tied == FAMILIES[family]["tie_word_embeddings"]
    assert hasattr(model, "lm_head") != model.tied


def test_a_head_that_is_tied_all_the_same_is_left_out(tmp_path: Path) -> None:
    folder = copied(mlx_checkpoint("llama", "4bit"), tmp_path)
    separate = logits(folder)
    edit_config(folder, lambda config: config.update(tie_word_embeddings=True))
    assert load_model(Checkpoint.open(folder)).tied
    assert not torch.equal(logits(folder), separate)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    folder = copied(mlx_checkpoint("llama", "dense"), tmp_path)
    expected = logits(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)


def test_overrides_win(tmp_path: Path) -> None:
    folder = mlx_checkpoint("llama", "4bit")
    edited = edit_config(copied(folder, tmp_path), lambda config: config.update(rope_theta=100.0))
    assert torch.equal(logits(folder, overrides={"rope_theta": 100.0}), logits(edited))
    assert not torch.equal(logits(folder), logits(edited))
    with pytest.raises(UserError, match=r"tensors that llama does not have: model\.layers\.1\."):
        logits(folder, overrides={"num_hidden_layers": 1})


def test_dynamic_scaling_ends_where_it_would_begin() -> None:
    checkpoint = Checkpoint.open(mlx_checkpoint("llama", "4bit"))
    model = load_model(checkpoint, overrides={"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    model.make_cache(1, 1024)
    with pytest.raises(UserError, match="'dynamic' is not supported beyond the 1024 positions of training"):
        model.make_cache(1, 1025)
    load_model(checkpoint).make_cache(1, 1025)


def test_heads_and_next_token_prediction_of_a_foreign_checkpoint(tmp_path: Path) -> None:
    folder = copied(transformers_checkpoint("qwen3_next", torch.float32), tmp_path)
    expected = logits(folder)
    tensors = load_file(folder / "model.safetensors")
    extra = {"mtp.fc.weight": torch.ones(4, 4), "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.ones(4, 4)}
    save_file(tensors | extra, folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)


def held(model: nn.Module) -> list[Tensor]:
    """Every tensor that a model's modules hold, weights taken apart into their own."""
    found: list[Tensor] = []

    def collect(value: object) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, DenseWeight):
            collect(value.tensor)
        elif isinstance(value, MergedWeight):
            collect(value.parts)
        elif isinstance(value, PackedWeight):
            layout = value._layout
            collect(layout if isinstance(layout, tuple) else (layout.planes, layout.scales_and_zeros, layout.biases))
        elif isinstance(value, tuple):
            for item in value:
                collect(item)

    for module in model.modules():
        for value in vars(module).values():
            collect(value)
    return found


def alive() -> dict[int, int]:
    """Address and bytes of every tensor storage that anything refers to."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) is Tensor and o.device.type == "cpu")
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", "dense"), ("llama", "4bit"), ("llama", "mixed_3_6"), ("llama", "mxfp4"), ("qwen3_next", "8bit")],
)
def test_weights_are_in_memory_once(family: str, recipe: str) -> None:
    folder = mlx_checkpoint(family, recipe)
    before = alive()
    checkpoint = Checkpoint.open(folder)
    model = load_model(checkpoint)
    after = {address: size for address, size in alive().items() if address not in before}
    # Storages, so that a view that keeps a larger tensor alive counts in full.
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held(model)}
    assert sum(own.values()) == sum(t.nbytes for t in held(model))
    assert sum(after.values()) == sum(own.values())


@pytest.mark.parametrize("recipe", ["dense", "4bit", "8bit", "3bit", "mixed_3_6", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_in_memory_are_those_of_the_checkpoint(family: str, recipe: str) -> None:
    checkpoint = Checkpoint.open(mlx_checkpoint(family, recipe))
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    read: list[int] = []
    # On a device without a layout of its own; fp32 frequencies, A_log and dt_bias are all that may be added.
    model = load_model(checkpoint, device="meta", progress=read.append)
    assert sum(read) == stored
    assert stored < sum(t.nbytes for t in held(model)) <= stored + 256


@pytest.mark.skipif(not FAST, reason="this CPU has no vectorised int4 kernel")
def test_bytes_in_the_int4_layout() -> None:
    """Three numbers a group where MLX has two: 38 bytes where it has 36, at 4 bits in groups of 64."""
    checkpoint = Checkpoint.open(mlx_checkpoint("llama", "4bit"))
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert stored < sum(t.nbytes for t in held(load_model(checkpoint))) <= stored * 38 / 36 + 256
