"""What the tests of `convert` share: reading what it wrote, and sources to spoil."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import transformers_checkpoint


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Read with the safetensors library."""
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def bits_of(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys()
    assert [name for name in a if bits_of(a[name]) != bits_of(b[name])] == []


def private_copy(family: str, tmp_path: Path) -> Path:
    """A transformers checkpoint that a test may spoil."""
    return Path(shutil.copytree(transformers_checkpoint(family), tmp_path / "source"))


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = read_json(folder / "config.json")
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
