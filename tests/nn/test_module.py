"""The module tree: its paths and matrices are those of mlx-lm's models."""

import mlx_lm.utils
import pytest

from gfxlm.models.load import build
from gfxlm.nn.module import Module, ModuleList, join, parent
from gfxlm.weights.checkpoint import Checkpoint
from tests.checkpoints import FAMILIES, mlx_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_what_mlx_can_quantise(family: str) -> None:
    folder = mlx_checkpoint(family, "dense")
    model, _ = build(Checkpoint.open(folder))
    theirs, _ = mlx_lm.utils.load_model(folder, lazy=True)
    expected = {p: tuple(m.weight.shape) for p, m in theirs.named_modules() if hasattr(m, "to_quantized")}
    ours = list(model.matrices())
    assert dict(ours) == expected
    assert len(ours) == len(expected)


def test_paths() -> None:
    assert join("", "model") == "model"
    assert join("model.layers", "0") == "model.layers.0"
    assert parent("model.layers.0") == "model.layers"
    assert parent("model") == ""


def test_module_list() -> None:
    modules = [Module() for _ in range(12)]
    listed = ModuleList(modules)
    assert len(listed) == 12
    assert list(listed) == modules
    assert [name for name, _ in listed.named_children()] == [str(n) for n in range(12)]
