"""What `convert` refuses, and that nothing half-written is ever left."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gfxlm.engine.convert import convert
from gfxlm.errors import UserError
from gfxlm.weights.save import _Place
from tests.checkpoints import mlx_checkpoint, transformers_checkpoint
from tests.engine.conversions import content, edit_config, private_copy, read_json


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return private_copy("llama", tmp_path)


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        convert(tmp_path / "missing", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"quantize": True, "dequantize": True}, "quantize, dequantize: choose one"),
    "upload": ({"upload_repo": "me/model"}, "upload_repo: nothing is uploaded"),
    "bits": ({"quantize": True, "q_bits": 7}, "q_bits: 7 is not one of"),
    "bits of a float mode": ({"quantize": True, "q_bits": 8, "q_mode": "nvfp4"}, "q_bits: 8 is not one of"),
    "group": ({"quantize": True, "q_group_size": 48}, "q_group_size: 48 is not one of"),
    "mode": ({"quantize": True, "q_mode": "gguf"}, "q_mode: 'gguf' is not one of"),
    "dtype": ({"dtype": "int8"}, "dtype: 'int8' is not one of float16, bfloat16, float32"),
    "recipe": ({"quantize": True, "quant_predicate": "mixed_9_9"}, "quant_predicate: 'mixed_9_9' is not one of"),
    "recipe with mode": (
        {"quantize": True, "quant_predicate": "mixed_3_6", "q_mode": "mxfp4"},
        "q_mode: the recipe mixed_3_6 needs 'affine', not 'mxfp4'",
    ),
    "predicate's bits": (
        {"quantize": True, "quant_predicate": lambda path, shape: {"bits": 7}},
        "quant_predicate: model.embed_tokens: bits: 7 is not one of",
    ),
    "predicate's keys": (
        {"quantize": True, "quant_predicate": lambda path, shape: {"global_scale": True}},
        "quant_predicate: model.embed_tokens: .*global_scale",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_options(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        convert(transformers_checkpoint("llama"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_quantised_source_is_not_quantised_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantised already"):
        convert(mlx_checkpoint("qwen3"), tmp_path / "out", quantize=True)
    assert list(tmp_path.iterdir()) == []


def test_foreign_quantisation_is_refused(llama: Path, tmp_path: Path) -> None:
    edit_config(llama, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(UserError, match="'fp8'"):
        convert(llama, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.clear(), "no tensors in it"),
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight: missing"),
        (
            lambda t: t.update({"model.layers.9.self_attn.q_proj.weight": torch.zeros(2, 2)}),
            r"does not have: model\.layers\.9",
        ),
        (lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}), r"lm_head\.weight: shape \(2, 2\) contradicts"),
    ],
)
def test_broken_checkpoints_are_refused_before_anything_is_written(
    edit: Callable[[dict[str, Tensor]], Any], message: str, llama: Path, tmp_path: Path
) -> None:
    tensors = load_file(llama / "model.safetensors")
    edit(tensors)
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(UserError, match=message):
        convert(llama, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_existing_output_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(transformers_checkpoint("llama"), out)
    (out / "stale.txt").touch()
    before = content(out)
    with pytest.raises(UserError, match=r"exists already.*--force"):
        convert(transformers_checkpoint("qwen3"), out)
    assert content(out) == before
    convert(transformers_checkpoint("qwen3"), out, force=True)
    assert read_json(out / "config.json")["model_type"] == "qwen3"
    assert not (out / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", [".", "..", "link"])
def test_source_is_never_replaced(place: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(llama)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama / name, tmp_path / name)
    out = tmp_path / "link" if place == "link" else llama / place
    before = content(tmp_path)
    with pytest.raises(UserError, match="holds the model that is converted"):
        convert(llama, out, force=True)
    assert content(tmp_path) == before


class Interrupt:
    """Raises when a third of the source has been read."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, done: int, total: int) -> None:
        if 3 * done > total:
            raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), None),
        (MemoryError(), None),
        (OSError(errno.EIO, "Input/output error", "model.safetensors"), "model.safetensors: Input/output error"),
    ],
)
def test_interrupted_conversion_leaves_nothing_behind(
    error: BaseException, message: str | None, tmp_path: Path
) -> None:
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match=message):
        convert(transformers_checkpoint("qwen3"), tmp_path / "out", progress=Interrupt(error))
    assert list(tmp_path.iterdir()) == []


def test_interrupted_replacement_leaves_the_old_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(transformers_checkpoint("llama"), out, quantize=True)
    before = content(out)
    with pytest.raises(KeyboardInterrupt):
        convert(transformers_checkpoint("qwen3"), out, force=True, progress=Interrupt(KeyboardInterrupt()))
    assert content(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, calls = _Place.append, 0

    def fills_the_disk(place: _Place, rows: Tensor, dtype: torch.dtype) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            place.file = Path("/dev/full")
        append(place, rows, dtype)

    monkeypatch.setattr(_Place, "append", fills_the_disk)
    with pytest.raises(UserError, match="disk full: "):
        convert(transformers_checkpoint("qwen3"), tmp_path / "out")
    assert calls == 5
    assert list(tmp_path.iterdir()) == []
