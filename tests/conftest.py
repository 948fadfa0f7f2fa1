"""What every test gets: one thread a worker, no network, and `torch.empty` full of NaN."""

import functools
import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: object, **kwargs: object) -> Tensor:
        out = allocate(*args, **kwargs)
        if out.device.type == "meta":
            return out
        return out.fill_(float("nan")) if out.is_floating_point() else out.view(torch.uint8).fill_(0xA5).view(out.dtype)

    return wrapper


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves part of its output unwritten shows it as NaN, not as yesterday's right answer."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
