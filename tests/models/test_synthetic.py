"""Models of random weights: real shapes, real formats, made where they are needed."""

import json
from pathlib import Path

import pytest
import torch

from gfxlm.engine.info import describe
from gfxlm.errors import UserError
from gfxlm.models.load import load_model
from gfxlm.models.synthetic import PUBLISHED, synthetic_checkpoint

CPU = torch.device("cpu")
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 300, "num_experts": 8, "head_dim": 32} | {
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


# Gigabytes that a token reads, worked out by hand from the published shapes.
@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [("qwen3-8b", 8.19, 4.26), ("qwen3-30b-a3b", 30.53, 1.72), ("qwen3-coder-next", 79.67, 2.03)],
)
def test_published_sizes(name: str, parameters: float, active: float) -> None:
    info = describe(synthetic_checkpoint(name, CPU))
    assert info.parameters / 1e9 == pytest.approx(parameters, abs=0.01)
    assert info.active_bytes / 1e9 == pytest.approx(active, abs=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_small_copy_runs(name: str, tmp_path: Path) -> None:
    """The variance of activations neither explodes nor vanishes, so that logits look like a model's."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name] | SMALL))
    model = load_model(synthetic_checkpoint(str(tmp_path), CPU), dtype=torch.float32)
    logits = model(torch.arange(40).view(2, 20))
    assert 0.3 < logits.std() < 3
    again = load_model(synthetic_checkpoint(str(tmp_path / "config.json"), CPU), dtype=torch.float32)
    assert torch.equal(again(torch.arange(40).view(2, 20)), logits)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"neither a folder with a config.json nor one of qwen3-8b"):
        synthetic_checkpoint("gpt-7", CPU)
