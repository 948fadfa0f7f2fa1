"""config.json as it is found: two spellings, tagged floats, damage, and every trap of the quantization map."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gfxlm.errors import UserError
from gfxlm.ops.formats import Quantization
from gfxlm.weights.config import (
    QuantizationMap,
    config_dtype,
    normalized,
    read_config,
    read_generation_config,
    read_json,
)

BF16 = torch.bfloat16


def write(file: Path, content: object) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


def test_tagged_floats(tmp_path: Path) -> None:
    tagged = {"a": {"__float__": "Infinity"}, "b": [{"__float__": "-Infinity"}, {"c": {"__float__": "NaN"}}]}
    found = read_json(write(tmp_path / "config.json", tagged))
    assert found["a"] == math.inf
    assert found["b"][0] == -math.inf
    assert math.isnan(found["b"][1]["c"])


@pytest.mark.parametrize("value", [{"__float__": "12"}, {"__float__": [1]}, {"__float__": "NaN", "more": 1}, {}])
def test_what_only_looks_like_a_tag_stays(value: dict[str, Any], tmp_path: Path) -> None:
    assert read_json(write(tmp_path / "config.json", {"a": value}))["a"] == value


@pytest.mark.parametrize("read", [read_json, lambda path: read_config(path.parent)], ids=["read_json", "read_config"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{'model_type': 'llama'}", "not valid JSON: .* line 1 column 2"),
        (b'{"model_type": "ll\xffma"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"__float__": "NaN"}', "expected a JSON object"),
    ],
)
def test_damaged_json(read: Callable[[Path], object], content: bytes, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", content)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: {message}"):
        read(file)


def test_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: not a model folder"):
        read_config(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: No such file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["llama"]}])
def test_config_without_a_model_type(config: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "config.json", config)
    with pytest.raises(UserError, match=r"config\.json: no model_type"):
        read_config(tmp_path)


@pytest.mark.parametrize(("generation", "eos"), [({"eos_token_id": [3, 4]}, [3, 4]), ({"eos_token_id": 0}, 0), ({}, 7)])
def test_eos_of_the_generation_config_wins(generation: dict[str, Any], eos: object, tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"model_type": "llama", "eos_token_id": 7})
    assert read_config(tmp_path)["eos_token_id"] == 7
    assert read_generation_config(tmp_path) == {}
    write(tmp_path / "generation_config.json", generation)
    assert read_config(tmp_path)["eos_token_id"] == eos
    assert read_generation_config(tmp_path) == generation


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.25}},
            {"rope_theta": 5e5, "partial_rotary_factor": 0.25},
        ),
        # Both spellings at once: the flat one is what mlx-lm reads, unless it is empty.
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 1e4}),
        (
            {"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        ({"num_local_experts": 8}, {"num_experts": 8}),
        ({"num_local_experts": 8, "num_experts": None}, {"num_experts": 8}),
        ({"num_local_experts": 8, "num_experts": 4}, {"num_experts": 4}),
    ],
)
def test_both_spellings_of_transformers(written: dict[str, Any], means: dict[str, Any]) -> None:
    found = normalized(written)
    assert {key: found.get(key) for key in ("rope_theta", "rope_scaling", "partial_rotary_factor", "num_experts")} == {
        **dict.fromkeys(("rope_theta", "rope_scaling", "partial_rotary_factor", "num_experts")),
        **means,
    }


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"torch_dtype": "torch.float32"}, torch.float32),
        ({"dtype": "int8"}, None),
        ({"dtype": "Tensor"}, None),
        ({}, None),
    ],
)
def test_dtype_of_a_config(config: dict[str, Any], dtype: torch.dtype | None) -> None:
    assert config_dtype(config) == dtype


def test_shapes_win_over_the_top_level() -> None:
    parsed = QuantizationMap.parse({"quantization": {"group_size": 64, "bits": 4, "mode": "mxfp4"}})
    for bits in (2, 3, 4, 5, 6, 8):
        for group_size in (32, 64, 128):
            found = parsed.of("x", 256, 256 * bits // 32, 256 // group_size, BF16)
            assert found == Quantization(group_size, bits)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_float_modes_are_known_by_their_scales(mode: str, bits: int, group_size: int) -> None:
    found = QuantizationMap.parse({}).of("x", 128, 128 * bits // 32, 128 // group_size, torch.uint8)
    assert found == Quantization(group_size, bits, mode)


def shapes(q: Quantization, columns: int = 256) -> tuple[int, int, int, torch.dtype]:
    return columns, q.packed_columns(columns), columns // q.group_size, BF16 if q.affine else torch.uint8


@pytest.mark.parametrize(
    ("override", "means"),
    [
        # An override without a mode is affine, whatever the top level says.
        ({"group_size": 64, "bits": 8}, Quantization(64, 8)),
        ({"group_size": 64, "bits": 8, "mode": None}, Quantization(64, 8)),
        ({"group_size": None, "bits": 6}, Quantization(64, 6)),
        ({"bits": 6}, Quantization(64, 6)),
        ({"group_size": 128}, Quantization(128, 4)),
        ({"group_size": 128, "bits": None}, Quantization(128, 4)),
        ({"mode": "mxfp8"}, Quantization(32, 8, "mxfp8")),
        ({"group_size": None, "mode": "nvfp4"}, Quantization(16, 4, "nvfp4")),
    ],
)
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_override_fills_in_defaults(key: str, override: dict[str, Any], means: Quantization) -> None:
    entry = {"group_size": 32, "bits": 4, "mode": "mxfp4", "a.gate": override, "not.in.the.model": {"bits": 2}}
    parsed = QuantizationMap.parse({"model_type": "llama", key: entry})
    assert parsed.of("a.gate", *shapes(means)) == means
    assert parsed.of("another", *shapes(Quantization(32, 5))) == Quantization(32, 5)


def test_false_leaves_it_to_the_shapes() -> None:
    parsed = QuantizationMap.parse({"quantization": {"group_size": 64, "bits": 4, "a.gate": False, "b": True}})
    for path in ("a.gate", "b"):
        assert parsed.of(path, *shapes(Quantization(64, 8))) == Quantization(64, 8)


@pytest.mark.parametrize(
    ("override", "stored"),
    [
        ({"bits": 8}, Quantization(64, 4)),
        ({"bits": 4}, Quantization(64, 8)),
        ({"group_size": 32}, Quantization(64, 4)),
        # Words and scales fit as numbers, but the scales are of the other kind.
        ({"group_size": 32, "bits": 4}, Quantization(32, 4, "mxfp4")),
        ({"mode": "mxfp4"}, Quantization(32, 4)),
    ],
)
def test_override_that_contradicts_the_shapes(override: dict[str, Any], stored: Quantization) -> None:
    parsed = QuantizationMap.parse({"quantization": {"a.gate": override}})
    with pytest.raises(UserError, match=r"^a\.gate: .* contradicts the tensors"):
        parsed.of("a.gate", *shapes(stored))


@pytest.mark.parametrize(
    ("columns", "words", "groups", "scales"),
    [
        (256, 56, 4, BF16),  # 7 bits
        (256, 32, 16, BF16),  # groups of 16
        (256, 33, 4, BF16),  # 4 bits and a word too many
        (256, 32, 3, BF16),  # 3 scales for 256 columns
        (256, 32, 0, BF16),
        (256, 0, 4, BF16),
        (256, 32, 4, torch.uint8),  # float modes have no groups of 64
        (256, 16, 8, torch.uint8),  # nor 2 bits
        (256, 64, 16, torch.uint8),  # nor 8 bits in groups of 16
    ],
)
def test_shapes_that_are_no_format(columns: int, words: int, groups: int, scales: torch.dtype) -> None:
    with pytest.raises(UserError, match=f"^a.gate: .*{columns} inputs in {words} words with {groups} "):
        QuantizationMap.parse({}).of("a.gate", columns, words, groups, scales)


@pytest.mark.parametrize(
    "override",
    [
        {"bits": 7},
        {"bits": "4"},
        {"bits": 4.0},
        {"bits": True},
        {"bits": [4]},
        {"group_size": 48},
        {"group_size": "64"},
        {"mode": "int4"},
        {"mode": ["affine"]},
        {"mode": "mxfp4", "bits": 8},
    ],
)
def test_override_that_mlx_does_not_have(override: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^config\.json: quantization of a\.gate: (bits|group_size|mode)"):
        QuantizationMap.parse({"quantization": {"a.gate": override}})


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes"])
def test_foreign_formats(method: str) -> None:
    # Some of them have the keys of an MLX entry too.
    for entry in ({"quant_method": method}, {"quant_method": method, "bits": 4, "group_size": 128}):
        with pytest.raises(UserError, match=f"quantised with '{method}', which is not an MLX format"):
            QuantizationMap.parse({"quantization_config": entry})


def test_mlx_entry_beside_a_foreign_one() -> None:
    parsed = QuantizationMap.parse({"quantization": {"bits": 4}, "quantization_config": {"quant_method": "fp8"}})
    assert parsed.overrides == {}


@pytest.mark.parametrize("entry", ["4bit", 4, [4], True])
def test_entry_that_is_no_object(entry: object) -> None:
    for key in ("quantization", "quantization_config"):
        with pytest.raises(UserError, match=rf"config\.json: {key} is not an object"):
            QuantizationMap.parse({key: entry})


@pytest.mark.parametrize("config", [{}, {"quantization": None}, {"quantization_config": None}, {"quantization": {}}])
def test_no_quantization_at_all(config: dict[str, Any]) -> None:
    assert QuantizationMap.parse(config).overrides == {}
