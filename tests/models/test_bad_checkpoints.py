"""Checkpoints that cannot be loaded: one line that names the file or folder and the problem, and nothing else."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.models.load import load_model
from gfxlm.ops.quantized import quantize
from gfxlm.weights.checkpoint import Checkpoint

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}
MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "rope_theta": 1e4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
}
NEXT = MOE | {
    "model_type": "qwen3_next",
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 32,
}
SHAPES = {
    "model.embed_tokens.weight": (32, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.layers.0.mlp.gate_proj.weight": (96, 64),
    "model.layers.0.mlp.up_proj.weight": (96, 64),
    "model.layers.0.post_attention_layernorm.weight": (64,),
    "model.layers.0.self_attn.k_proj.weight": (32, 64),
    "model.layers.0.self_attn.o_proj.weight": (64, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.v_proj.weight": (32, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (32, 64),
}
QUANTIZATION = {"group_size": 32, "bits": 4, "mode": "affine"}
TOKENS = torch.tensor([[1, 2, 3]])


def dense_tensors() -> dict[str, Tensor]:
    return {name: torch.randn(shape) / 8 for name, shape in SHAPES.items()}


def quantised_tensors() -> dict[str, Tensor]:
    out = {}
    for name, tensor in dense_tensors().items():
        parts = quantize(tensor, 32, 4) if tensor.ndim == 2 else (tensor,)
        out |= {name.replace("weight", kind): t for kind, t in zip(("weight", "scales", "biases"), parts, strict=False)}
    return out


def write(folder: Path, config: Any, tensors: dict[str, Tensor]) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder


def load(folder: Path) -> Tensor:
    """Open, load and run."""
    logits = load_model(Checkpoint.open(folder))(TOKENS)
    assert logits.shape[:2] == TOKENS.shape
    return logits


def refusal(attempt: Callable[[], object], folder: Path) -> str:
    """The UserError's message without the folder, with which it begins; it is one line."""
    with pytest.raises(UserError) as caught:
        attempt()
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert message.isprintable()
    return message.removeprefix(str(folder)).lstrip(":/ ")


def test_what_is_damaged_below_is_sound(tmp_path: Path) -> None:
    assert load(write(tmp_path, LLAMA, dense_tensors())).isfinite().all()
    assert load(write(tmp_path, LLAMA | {"quantization": QUANTIZATION}, quantised_tensors())).isfinite().all()


@pytest.mark.parametrize("name", SHAPES)
def test_missing_tensor(name: str, tmp_path: Path) -> None:
    tensors = dense_tensors()
    del tensors[name]
    write(tmp_path, LLAMA, tensors)
    assert refusal(lambda: load(tmp_path), tmp_path) == f"{name}: missing in the checkpoint"


@pytest.mark.parametrize("kind", ["scales", "biases"])
def test_missing_half_of_a_quantised_matrix(kind: str, tmp_path: Path) -> None:
    tensors = quantised_tensors()
    del tensors[f"model.layers.0.mlp.down_proj.{kind}"]
    write(tmp_path, LLAMA | {"quantization": QUANTIZATION}, tensors)
    assert refusal(lambda: load(tmp_path), tmp_path).startswith("model.layers.0.mlp.down_proj.")


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["model.layers.1.mlp.up_proj.weight"], "model.layers.1.mlp.up_proj.weight"),
        (["a", "b", "c", "d", "e"], "a, b, c and 2 more"),
        (["model.layers.0.self_attn.q_proj.bias"], "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_extra_tensor(extra: list[str], named: str, tmp_path: Path) -> None:
    write(tmp_path, LLAMA, dense_tensors() | {name: torch.ones(1) for name in extra})
    assert refusal(lambda: load(tmp_path), tmp_path) == f"tensors that llama does not have: {named}"


@pytest.mark.parametrize(
    ("change", "named", "found", "wanted"),
    [
        ({"vocab_size": 33}, "model.embed_tokens.weight", (32, 64), (33, 64)),
        ({"hidden_size": 128}, "model.embed_tokens.weight", (32, 64), (32, 128)),
        ({"intermediate_size": 128}, "model.layers.0.mlp.gate_proj.weight", (96, 64), (128, 64)),
        ({"head_dim": 64}, "model.layers.0.self_attn.q_proj.weight", (64, 64), (128, 64)),
        ({"num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight", (32, 64), (64, 64)),
    ],
)
def test_config_that_contradicts_a_shape(
    change: dict[str, int], named: str, found: tuple[int, ...], wanted: tuple[int, ...], tmp_path: Path
) -> None:
    write(tmp_path, LLAMA | change, dense_tensors())
    message = refusal(lambda: load(tmp_path), tmp_path)
    assert message == f"{named}: shape {found} contradicts the config, which makes it {wanted}"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"vocab_size": 33}, r"embed_tokens.weight: .*\(33, 8\)"),
        # Twice the size reads as half the bits, so that the first to disagree is a norm.
        ({"hidden_size": 128}, r"input_layernorm.weight: .*\(128,\)"),
        ({"hidden_size": 192}, "embed_tokens: 192 inputs"),
        ({"intermediate_size": 160}, r"gate_proj.weight: .*\(160, 8\)"),
        ({"head_dim": 64}, r"q_proj.weight: .*\(128, 8\)"),
    ],
)
def test_config_that_contradicts_a_quantised_shape(change: dict[str, int], wrong: str, tmp_path: Path) -> None:
    write(tmp_path, LLAMA | change | {"quantization": QUANTIZATION}, quantised_tensors())
    message = refusal(lambda: load(tmp_path), tmp_path)
    assert re.match(f"model.*{wrong}", message)


@pytest.mark.parametrize("tied", [None, False])
def test_head_that_is_missing(tied: bool | None, tmp_path: Path) -> None:
    tensors = dense_tensors()
    del tensors["lm_head.weight"]
    write(tmp_path, LLAMA | {"tie_word_embeddings": tied}, tensors)
    if tied is None:
        assert load(tmp_path).isfinite().all()
    else:
        assert refusal(lambda: load(tmp_path), tmp_path) == "lm_head.weight: missing in the checkpoint"


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quantization": {**QUANTIZATION, "model.embed_tokens": {"bits": 8}}}, "model.embed_tokens: .* contradicts"),
        ({"quantization": {**QUANTIZATION, "model.embed_tokens": {"bits": 7}}}, "config.json: .*embed_tokens: bits"),
        ({"quantization": "4bit"}, "config.json: quantization is not an object"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "quantised with 'gptq'"),
    ],
)
def test_bad_quantization(quantization: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, LLAMA | quantization, quantised_tensors())
    assert re.match(message, refusal(lambda: load(tmp_path), tmp_path))


def test_data_that_disappear_after_opening(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, LLAMA, dense_tensors()))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    message = refusal(lambda: load_model(checkpoint), tmp_path)
    assert message == "model.safetensors: the file became shorter while it was read"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported; known are llama, mistral, qwen2"),
        ({"model_type": "llama"}, "needs hidden_size, num_hidden_layers, intermediate_size, num_attention_heads, rms"),
        (LLAMA | {"hidden_size": None}, "LlamaConfig needs hidden_size"),
        ({**LLAMA, "model_type": "qwen3"}, "Qwen3Config needs rope_theta"),
        ({k: v for k, v in MOE.items() if k != "num_experts"}, "Qwen3MoeConfig needs num_experts"),
        (LLAMA | {"model_file": "model.py"}, "needs its own Python code"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size cannot be '64'"),
        (LLAMA | {"hidden_size": 64.0}, "hidden_size cannot be 64.0"),
        (LLAMA | {"hidden_size": True}, "hidden_size cannot be True"),
        (LLAMA | {"hidden_size": -64}, "hidden_size cannot be -64"),
        (LLAMA | {"hidden_size": 0}, "hidden_size cannot be 0"),
        (LLAMA | {"hidden_size": 1}, "hidden_size 1 is too small"),
        (LLAMA | {"hidden_size": 66}, "even number of rotary dimensions, not 33"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads cannot be 0"),
        (LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads 3 is no multiple of .* 2"),
        (LLAMA | {"rms_norm_eps": "1e-6"}, "rms_norm_eps cannot be '1e-6'"),
        (LLAMA | {"rms_norm_eps": -1.0}, "rms_norm_eps cannot be -1.0"),
        (json.dumps(LLAMA | {"rms_norm_eps": float("nan")}), "rms_norm_eps cannot be nan"),
        (LLAMA | {"rope_theta": {"__float__": "Infinity"}}, "rope_theta cannot be inf"),
        (LLAMA | {"rope_theta": 0}, "rope_theta cannot be 0"),
        (LLAMA | {"rope_theta": [1e4]}, r"rope_theta cannot be \[10000.0\]"),
        (LLAMA | {"rope_scaling": "linear"}, "rope_scaling cannot be 'linear'"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling: type 'linear' needs 'factor'"),
        (LLAMA | {"rope_parameters": {"rope_type": "ntk"}}, "rope_scaling: type 'ntk' is not known"),
        (LLAMA | {"tie_word_embeddings": "no"}, "tie_word_embeddings cannot be 'no'"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (LLAMA | {"layer_types": []}, "layer_types has 0 entries for 1 layers"),
        (LLAMA | {"layer_types": "full_attention"}, "layer_types cannot be 'full_attention'"),
        (LLAMA | {"layer_types": [1]}, r"layer_types cannot be \[1\]"),
        (LLAMA | {"layer_types": ["chunked_attention"]}, "layer_types: 'chunked_attention' is not one of"),
        (MOE | {"num_experts_per_tok": 3}, "num_experts_per_tok cannot be 3 of 2 experts"),
        (MOE | {"num_experts_per_tok": 0}, "num_experts_per_tok cannot be 0 of 2 experts"),
        (MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step cannot be 0"),
        (MOE | {"mlp_only_layers": ["0"]}, r"mlp_only_layers cannot be \['0'\]"),
        (NEXT | {"linear_num_key_heads": 0}, "linear_num_key_heads cannot be 0"),
        (NEXT | {"linear_num_value_heads": 0}, "linear_num_value_heads 0 is no multiple"),
        (NEXT | {"linear_num_key_heads": 4}, "linear_num_value_heads 2 is no multiple of linear_num_key_heads 4"),
        (NEXT | {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim cannot be 0"),
        (NEXT | {"full_attention_interval": 0}, "full_attention_interval cannot be 0"),
        (NEXT | {"partial_rotary_factor": 1.5}, "partial_rotary_factor cannot be 1.5"),
        (NEXT | {"partial_rotary_factor": 0.1}, "even number of rotary dimensions, not 3"),
        (NEXT | {"partial_rotary_factor": 0.01}, "even number of rotary dimensions, not 0"),
        ("{}", "config.json: no model_type"),
        ("[]", "config.json: expected a JSON object"),
        ("", "config.json: not valid JSON"),
    ],
)
def test_bad_config(config: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, config, dense_tensors())
    assert re.search(message, refusal(lambda: load(tmp_path), tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.mlp.experts.1.up_proj.weight": None}, "has 1 experts, the config says 2"),
        ({"model.layers.0.mlp.experts.2.up_proj.weight": torch.ones(32, 64)}, "has 3 experts, the config says 2"),
        ({"model.layers.0.mlp.experts.1.up_proj.weight": torch.ones(16, 64)}, "experts differ in shape or type"),
        ({"model.layers.0.mlp.experts.1.up_proj.weight": torch.ones(32, 64).half()}, "experts differ in shape or type"),
    ],
)
def test_experts_that_do_not_stack(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    experts = {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": torch.ones(shape)
        for e in (0, 1)
        for name, shape in shapes.items()
    }
    tensors = {name: t for name, t in (dense_tensors() | experts | change).items() if t is not None}
    write(tmp_path, MOE, tensors)
    found = refusal(lambda: load(tmp_path), tmp_path)
    assert found.startswith("model.layers.0.mlp.switch_mlp.up_proj.weight: ")
    assert message in found


@pytest.mark.parametrize("shape", [(), (64,), (64, 4), (64, 2, 4), (64, 4, 2), (64, 1, 4, 1)])
def test_convolution_of_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    name = "model.layers.0.linear_attn.conv1d.weight"
    write(tmp_path, NEXT, {name: torch.ones(shape)})
    assert "missing in the checkpoint" in refusal(lambda: load(tmp_path), tmp_path)
    parts = {"in_proj_qkvz": (96, 64), "in_proj_ba": (4, 64), "out_proj": (64, 32)}
    tensors = {f"model.layers.0.linear_attn.{part}.weight": torch.ones(size) for part, size in parts.items()}
    write(tmp_path, NEXT, dense_tensors() | tensors | {name: torch.ones(shape)})
    assert refusal(lambda: load(tmp_path), tmp_path).startswith(f"{name}: shape {shape} contradicts")


def loads_or_refuses(folder: Path) -> None:
    """Either everything works, or the message is one line that begins with the folder."""
    refused = str(folder)
    try:
        load(folder)
    except UserError as error:
        refused = str(error)
    assert refused.startswith(str(folder))
    assert refused.isprintable()


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(place=st.integers(0, 3000), removed=st.integers(0, 3), inserted=st.binary(max_size=3))
def test_any_byte_of_a_header(place: int, removed: int, inserted: bytes, tmp_path: Path) -> None:
    write(tmp_path, LLAMA | {"quantization": QUANTIZATION}, quantised_tensors())
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    place %= length
    header = whole[:place] + inserted + whole[place + removed : length]
    if place >= 8:  # the length is put right, so that more than the length is tried
        header = (len(header) - 8).to_bytes(8, "little") + header[8:]
    file.write_bytes(header + whole[length:])
    loads_or_refuses(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 130) | st.floats() | st.sampled_from(["", "llama", "yarn", "affine"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["type", "rope_type", "factor", "bits", "model.norm", "mode"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
FIELDS = (
    *NEXT,
    "rope_scaling",
    "rope_parameters",
    "head_dim",
    "layer_types",
    "quantization",
    "hidden_act",
)


@fuzz
@given(
    base=st.sampled_from([LLAMA, NEXT]),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2),
)
def test_any_config(base: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, base | {"quantization": QUANTIZATION} | changes, quantised_tensors())
    loads_or_refuses(tmp_path)
