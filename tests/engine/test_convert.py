"""`convert` against mlx-lm's own, byte by byte."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pytest
import torch
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import _get_classes, quantize_model
from safetensors.torch import load_file
from torch import Tensor

import gfxlm.engine.convert
from gfxlm.engine.convert import RECIPES, choose_formats, convert
from gfxlm.models import model_class
from gfxlm.models.load import load_model
from gfxlm.ops.formats import Quantization
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.save import write_weights
from tests.checkpoints import FAMILIES, mlx_checkpoint, transformers_checkpoint
from tests.engine.conversions import assert_same_tensors, bits_of, edit_config, private_copy, read_json, tensors_of
from tests.models.test_against_mlx import TOKENS, mlx_logits

Options = dict[str, Any]
CASES: dict[str, Options] = {
    "dense": {},
    "dense float16": {"dtype": "float16"},
    "4bit": {"quantize": True},
    "4bit float32": {"quantize": True, "dtype": "float32"},
    "8bit": {"quantize": True, "q_bits": 8},
    "3bit g32": {"quantize": True, "q_bits": 3, "q_group_size": 32},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "mxfp8": {"quantize": True, "q_mode": "mxfp8"},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4"},
    "mixed_3_6": {"quantize": True, "quant_predicate": "mixed_3_6", "q_group_size": 64},
}


def our_logits(folder: Path) -> Tensor:
    return load_model(Checkpoint.open(folder), dtype=torch.float32)(TOKENS)


def assert_close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 1e-3 * b.std()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return private_copy("llama", tmp_path)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_mlx_lm(family: str, case: str, tmp_path: Path) -> None:
    source, ours, theirs = transformers_checkpoint(family), tmp_path / "ours", tmp_path / "theirs"
    mlx_lm.convert(str(source), str(theirs), **CASES[case])
    convert(source, ours, **CASES[case])
    assert_same_tensors(ours, theirs)
    assert read_json(ours / "config.json") == read_json(theirs / "config.json")
    assert list(read_json(ours / "config.json")) == sorted(read_json(ours / "config.json"))
    index, reference = (read_json(f / "model.safetensors.index.json") for f in (ours, theirs))
    assert list(index["weight_map"].items()) == list(reference["weight_map"].items())
    assert index["metadata"]["total_size"] == reference["metadata"]["total_size"]
    # mlx-lm counts the modules without children, and so leaves out A_log and dt_bias of the delta nets.
    left_out = sum(t.numel() for name, t in tensors_of(ours).items() if name.endswith(("A_log", "dt_bias")))
    assert index["metadata"]["total_parameters"] == reference["metadata"]["total_parameters"] + left_out


@pytest.mark.parametrize("case", ["dense", "4bit", "mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_loads_it_and_agrees(family: str, case: str, tmp_path: Path) -> None:
    convert(transformers_checkpoint(family), tmp_path / "ours", **CASES[case])
    assert_close(our_logits(tmp_path / "ours"), mlx_logits(tmp_path / "ours", fp32=True))
    _, tokenizer = mlx_lm.load(str(tmp_path / "ours"))
    assert tokenizer.decode(tokenizer.encode("def add_1(x): ünïcode")) == "def add_1(x): ünïcode"


def weightless(family: str, **settings: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Our model, mlx-lm's, and their config. Nobody computes a weight."""
    config = FAMILIES[family] | {"model_type": family} | settings
    ours = model_class(family).Config.from_dict(config)
    model, args = _get_classes(config)
    return model_class(family)(ours, tied=config["tie_word_embeddings"]), model(args.from_dict(config)), config


def assert_same_choice(family: str, q: Quantization, recipe: str | None, **settings: Any) -> None:
    ours, theirs, config = weightless(family, **settings)
    predicate = recipe and mixed_quant_predicate_builder(recipe, theirs, q.group_size)
    theirs, config = quantize_model(theirs, config, q.group_size, q.bits, q.mode, quant_predicate=predicate)
    formats, entry = choose_formats(ours, q, recipe)
    assert entry == config["quantization"]
    assert formats == {
        path: Quantization(module.group_size, module.bits, module.mode)
        for path, module in theirs.named_modules()
        if hasattr(module, "bits")
    }


@pytest.mark.parametrize("layers", [7, 24])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_choose_as_mlx_lm_does(family: str, recipe: str, layers: int) -> None:
    assert_same_choice(family, Quantization(32, 4), recipe, num_hidden_layers=layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_that_groups_do_not_divide_stay_dense(family: str) -> None:
    sizes = {
        "hidden_size": 192,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 64,
    }
    assert_same_choice(family, Quantization(128, 4), None, **sizes)
    assert_same_choice(family, Quantization(64, 4), None, **sizes)
    assert_same_choice(family, Quantization(64, 4), "mixed_2_6", **sizes)
    assert_same_choice(family, Quantization(32, 8, "mxfp8"), None, **sizes)


def test_router_whose_own_groups_do_not_divide_it_stays_dense() -> None:
    model, _, _ = weightless("qwen3_moe", hidden_size=96)
    formats, entry = choose_formats(model, Quantization(32, 4, "mxfp4"))
    assert "model.layers.0.mlp.switch_mlp.up_proj" in formats
    assert not [path for path in [*formats, *entry] if path.endswith("mlp.gate")]


def test_recipe_without_a_group_size_says_which_it_took(tmp_path: Path) -> None:
    # mlx-lm writes null here, which stands for the same 64.
    convert(transformers_checkpoint("qwen3"), tmp_path / "ours", quantize=True, quant_predicate="mixed_4_6")
    entry = read_json(tmp_path / "ours/config.json")["quantization"]
    assert entry["model.layers.1.self_attn.v_proj"] == {"group_size": 64, "bits": 6, "mode": "affine"}


def test_predicate_of_the_callers_own(tmp_path: Path) -> None:
    def predicate(path: str, _: object) -> bool | dict[str, Any]:
        if path.endswith("down_proj"):
            return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        return not path.endswith("o_proj")

    options: Options = {"quantize": True, "q_bits": 5, "q_group_size": 32, "quant_predicate": predicate}
    source = str(transformers_checkpoint("qwen3_moe"))
    mlx_lm.convert(source, str(tmp_path / "theirs"), **options)
    convert(source, tmp_path / "ours", **options)
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert read_json(tmp_path / "ours/config.json") == read_json(tmp_path / "theirs/config.json")


def test_predicate_gets_path_and_shape(tmp_path: Path) -> None:
    seen = {}
    source = transformers_checkpoint("qwen3_moe")
    convert(
        source, tmp_path / "out", quantize=True, quant_predicate=lambda path, shape: bool(seen.update({path: shape}))
    )
    assert seen["model.layers.0.mlp.switch_mlp.down_proj"] == (8, 128, 128)
    assert not any(name.endswith(".scales") for name in tensors_of(tmp_path / "out"))


def without_data(stack: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """Fails where experts are joined in memory."""

    def checked(tensors: list[Tensor]) -> Tensor:
        assert all(tensor.is_meta for tensor in tensors)
        return stack(tensors)

    return checked


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_blocks_and_shards_change_no_byte(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = transformers_checkpoint(family)
    convert(source, tmp_path / "whole", quantize=True)
    monkeypatch.setattr(gfxlm.engine.convert, "_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(gfxlm.engine.convert, "write_weights", partial(write_weights, max_shard_bytes=20_000))
    monkeypatch.setattr(torch, "stack", without_data(torch.stack))
    convert(source, tmp_path / "cut", quantize=True)
    files = sorted(file.name for file in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 5
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    weight_map = read_json(tmp_path / "cut/model.safetensors.index.json")["weight_map"]
    assert weight_map == {name: file for file in files for name in load_file(tmp_path / "cut" / file)}
    assert_same_tensors(tmp_path / "cut", tmp_path / "whole")
    monkeypatch.undo()
    assert torch.equal(mlx_logits(tmp_path / "cut", fp32=True), mlx_logits(tmp_path / "whole", fp32=True))


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("recipe", ["4bit", "3bit-32", "mixed_3_6", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "qwen3_next"])
def test_dequantize_equals_mlx_lm(
    family: str, recipe: str, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ours, theirs = mlx_checkpoint(family, recipe), tmp_path / "ours", tmp_path / "theirs"
    # In bfloat16 MLX's CPU rounds product and sum; in float32 the product is exact. We round once.
    mlx_lm.convert(str(source), str(theirs), dequantize=True, dtype="float32")
    monkeypatch.setattr(gfxlm.engine.convert, "_BLOCK_ELEMENTS", 1000)
    convert(source, ours, dequantize=True, dtype=dtype)
    tensors, exact = tensors_of(ours), tensors_of(theirs)
    assert tensors.keys() == exact.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32 if dtype else torch.bfloat16}
    assert [name for name, tensor in tensors.items() if bits_of(tensor) != bits_of(exact[name].to(tensor.dtype))] == []
    assert read_json(ours / "config.json") == read_json(theirs / "config.json")
    assert not read_json(ours / "config.json").keys() & {"quantization", "quantization_config"}


@pytest.mark.parametrize("recipe", ["4bit", "nvfp4"])
def test_mlx_lm_loads_the_dequantised_model_and_agrees(recipe: str, tmp_path: Path) -> None:
    source = mlx_checkpoint("qwen3_moe", recipe)
    convert(source, tmp_path / "out", dequantize=True, dtype="float32")
    assert_close(mlx_logits(tmp_path / "out", fp32=False), mlx_logits(source, fp32=True))


def test_quantised_source_is_passed_on_or_cast(tmp_path: Path) -> None:
    source = mlx_checkpoint("qwen3_moe", "mxfp4")
    convert(source, tmp_path / "same")
    assert_same_tensors(tmp_path / "same", source)
    assert read_json(tmp_path / "same/config.json") == read_json(source / "config.json")
    convert(source, tmp_path / "cast", dtype="float16")
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), dtype="float16")
    assert_same_tensors(tmp_path / "cast", tmp_path / "theirs")


def test_quantised_weights_keep_their_dtype_whatever_the_config_says(tmp_path: Path) -> None:
    # As in mlx-lm, a conversion to another type leaves the config's word for it.
    convert(transformers_checkpoint("qwen3"), tmp_path / "half", quantize=True, dtype="float16")
    assert read_json(tmp_path / "half/config.json")["dtype"] == "bfloat16"
    convert(tmp_path / "half", tmp_path / "same")
    assert_same_tensors(tmp_path / "same", tmp_path / "half")
    convert(tmp_path / "half", tmp_path / "dense", dequantize=True)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "dense").values()} == {torch.float16}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_names_the_dtype_in_either_spelling(key: str, llama: Path, tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        del config["dtype"]
        config[key] = "float16"

    edit_config(llama, edit)
    convert(llama, tmp_path / "ours")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "ours").values()} == {torch.float16}


@pytest.mark.parametrize("value", [None, "float64", "int8", "auto"])
def test_without_such_a_dtype_weights_keep_theirs(value: str | None, llama: Path, tmp_path: Path) -> None:
    edit_config(llama, lambda config: config.update(dtype=value))
    convert(llama, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", llama)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_spelling_becomes_one_that_mlx_lm_reads(family: str, tmp_path: Path) -> None:
    source = private_copy(family, tmp_path)
    nested = {"rope_theta": 77_000.0, "rope_type": "default"}
    if family == "qwen3_next":
        nested["partial_rotary_factor"] = 0.5

    def edit(config: dict[str, Any]) -> None:
        for key in ("rope_theta", "partial_rotary_factor", "rope_scaling"):
            config.pop(key, None)
        if family == "qwen3_moe":
            del config["num_experts"]
            assert config["num_local_experts"] == 8
        config["rope_parameters"] = nested

    edit_config(source, edit)
    convert(source, tmp_path / "ours", quantize=True)
    config = read_json(tmp_path / "ours/config.json")
    assert config["rope_parameters"] == nested
    assert config["rope_theta"] == 77_000.0
    assert_close(our_logits(source.parent / "ours"), mlx_logits(tmp_path / "ours", fp32=True))


def test_transformers_5_rope_scaling(llama: Path, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }

    def edit(config: dict[str, Any]) -> None:
        del config["rope_theta"]
        config["rope_parameters"] = {"rope_theta": 1000.0} | scaling

    unscaled = our_logits(llama)
    edit_config(llama, edit)
    convert(llama, tmp_path / "ours")
    assert read_json(tmp_path / "ours/config.json")["rope_scaling"] == scaling
    theirs = mlx_logits(tmp_path / "ours", fp32=True)
    assert_close(our_logits(tmp_path / "ours"), theirs)
    assert (theirs - unscaled).abs().max() > 0.1 * unscaled.std()


def test_config_says_whether_the_head_is_tied(llama: Path, tmp_path: Path) -> None:
    # mlx-lm takes a Llama whose config is silent for tied and drops its head.
    edit_config(llama, lambda config: config.pop("tie_word_embeddings"))
    convert(llama, tmp_path / "ours")
    assert read_json(tmp_path / "ours/config.json")["tie_word_embeddings"] is False
    assert_close(our_logits(tmp_path / "ours"), mlx_logits(tmp_path / "ours", fp32=True))


def test_non_finite_numbers_stay_tagged(llama: Path, tmp_path: Path) -> None:
    tagged = {"__float__": "-Infinity"}
    edit_config(llama, lambda config: config.update(limits=[1.5, tagged], _name_or_path="x", vision_config={}))
    convert(llama, tmp_path / "ours")
    config = read_json(tmp_path / "ours/config.json")
    assert config["limits"] == [1.5, tagged]
    assert not config.keys() & {"_name_or_path", "vision_config"}
    mlx_lm.load(str(tmp_path / "ours"))


def test_tokenizer_files_are_copied_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    extra = [
        "merges.txt",
        "vocab.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "qwen.tiktoken",
        "configuration.py",
    ]
    extra.append("additional_chat_templates/tools.jinja")
    dropped = ["README.md", "pytorch_model.bin", "training_args.json", "onnx/tokenizer.json"]
    # As in the hub's cache: links to files elsewhere. And as on many disks: Windows line ends.
    for name in extra + dropped:
        blob = tmp_path / "blobs" / name
        for path in (blob, llama / name):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(b'raise SystemExit("never run")\r\n')
        (llama / name).symlink_to(blob)
    (llama / "tokenizer.d").mkdir()
    convert(llama, tmp_path / "ours")
    found = {str(p.relative_to(tmp_path / "ours")) for p in (tmp_path / "ours").rglob("*") if not p.is_dir()}
    assert found == {*kept, *extra, "config.json", "model.safetensors", "model.safetensors.index.json"}
    for name in kept + extra:
        copy = tmp_path / "ours" / name
        assert not copy.is_symlink()
        assert copy.read_bytes() == (llama / name).read_bytes()


@pytest.mark.parametrize(("family", "options"), [("qwen2", {}), ("qwen3_next", {"quantize": True})])
def test_progress_counts_source_bytes(family: str, options: Options, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    source = transformers_checkpoint(family)
    convert(source, tmp_path / "ours", progress=lambda done, total: steps.append((done, total)), **options)
    size = sum(tensor.nbytes for tensor in tensors_of(source).values())
    assert {total for _, total in steps} == {size}
    assert steps[-1] == (size, size)
    assert np.all(np.diff([done for done, _ in steps]) > 0)
    assert len(steps) == len(tensors_of(source))
