"""Vectors of texts: chunks change nothing, and what fails is told."""

import pytest
import torch

from gfxlm import load
from gfxlm.engine.embedding import Pooling, embedded
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM

PROMPTS = [[17, 300, 41, 5, 9, 12, 400], [5]]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load("builtin")[0]


def vectors(model: CausalLM, pooling: Pooling, chunk: int) -> tuple[list[list[float]], int]:
    """The vectors, and how many chunks they took."""
    work = embedded(model, PROMPTS, pooling, chunk=chunk)
    chunks = 0
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value, chunks
        chunks += 1


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_chunks_change_nothing_but_how_long_others_wait(model: CausalLM, pooling: Pooling) -> None:
    whole, one_each = vectors(model, pooling, 2048)
    cut, more = vectors(model, pooling, 3)
    assert (one_each, more) == (2, 4)
    torch.testing.assert_close(torch.tensor(cut), torch.tensor(whole), atol=2e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(whole).norm(dim=1), torch.ones(2))


def test_an_empty_prompt_is_refused(model: CausalLM) -> None:
    with pytest.raises(UserError, match="empty"):
        next(embedded(model, [[]], "mean"))


def test_no_room_for_keys_and_values_is_an_error_of_this_text_alone(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(type(model), "make_cache", full)
    with pytest.raises(UserError, match="out of memory"):
        next(embedded(model, PROMPTS, "mean"))
