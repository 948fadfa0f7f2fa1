"""What a model would launch, found out without its weights."""

import pytest
import torch
from torch import Tensor

from gfxlm.device.arch import named
from gfxlm.engine.warmup import ModelCases, _without_weights
from gfxlm.errors import UserError
from gfxlm.kernels.record import record
from gfxlm.weights import safetensors_file


@pytest.fixture
def _no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: object) -> Tensor:
        raise AssertionError("weights are read")

    _without_weights.cache_clear()
    monkeypatch.setattr(safetensors_file.Extent, "read_into", read)


@pytest.mark.usefixtures("_no_reading")
@pytest.mark.parametrize("arch", ["gfx1151", "gfx942", "sm_90"])
def test_a_models_launches(arch: str) -> None:
    cases = ModelCases("builtin", dtype="float16")
    assert {"1x1", "8x1", "1x512", "chunk512"} <= set(cases.names())
    one, many, chunk = (record(cases(name), named(arch)) for name in ("1x1", "1x512", "chunk512"))
    assert {launch.kernel.__name__ for launch in chunk} >= {"prefill_kernel", "chunk_walk_kernel"}
    assert {launch.kernel.__name__ for launch in one} != {launch.kernel.__name__ for launch in many}
    floats = {a.dtype for launch in one for a in launch.arguments if isinstance(a, Tensor) and a.is_floating_point()}
    assert floats <= {torch.float16, torch.float32}


def test_no_such_model() -> None:
    with pytest.raises(UserError, match="nowhere"):
        ModelCases("./nowhere").names()
