"""Perplexity, against mlx-lm's and against a float64 sum by hand."""

import math

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx.utils import tree_map
from mlx_lm.perplexity import eval_ppl

import gfxlm
from gfxlm.engine import perplexity as module
from gfxlm.engine.perplexity import perplexity
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import GenerationError, UserError
from gfxlm.models.base import CausalLM
from tests.checkpoints import CORPUS, mlx_checkpoint


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def loaded(request: pytest.FixtureRequest) -> tuple[CausalLM, Tokenizer]:
    return gfxlm.load(mlx_checkpoint(request.param), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens(loaded: tuple[CausalLM, Tokenizer]) -> list[int]:
    return loaded[1].encode(CORPUS)


def by_hand(model: CausalLM, windows: list[list[int]]) -> tuple[float, float, int]:
    """Each window alone, in float64."""
    losses = []
    for window in windows:
        logits = model(torch.tensor([window]))[0].double().numpy()
        top = logits.max(-1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        losses += [-logprobs[i, token] for i, token in enumerate(window[1:])]
    value = math.exp(np.mean(losses))
    return value, value * np.std(losses, ddof=1) / math.sqrt(len(losses)), len(losses)


def test_mlx_lms_figure(tokens: list[int], request: pytest.FixtureRequest) -> None:
    family = request.node.callspec.params["loaded"]
    theirs, _ = mlx_lm.load(str(mlx_checkpoint(family)))
    theirs.update(
        tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, theirs.parameters())
    )
    windows = np.array(tokens[: 7 * 64]).reshape(7, 64)
    value, standard_error = eval_ppl(theirs, mx.array(windows), batch_size=3)
    model, _ = gfxlm.load(mlx_checkpoint(family), dtype=torch.float32)
    ours = perplexity(model, tokens[: 7 * 64], 64, 3)
    assert ours.tokens == 7 * 63
    assert ours.value == pytest.approx(value, rel=1e-4)
    assert ours.standard_error == pytest.approx(standard_error, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("count", [50, 64, 65, 200])
def test_windows_of_any_number_and_a_shorter_last_one(
    loaded: tuple[CausalLM, Tokenizer], tokens: list[int], count: int, batch_size: int
) -> None:
    model, text = loaded[0], tokens[:count]
    windows = [text[start : start + 64] for start in range(0, count, 64)]
    value, standard_error, predicted = by_hand(model, [window for window in windows if len(window) > 1])
    seen: list[tuple[int, int]] = []
    ours = perplexity(model, text, 64, batch_size, progress=lambda done, total: seen.append((done, total)))
    assert ours.tokens == predicted
    assert ours.value == pytest.approx(value, rel=1e-5)
    assert ours.standard_error == pytest.approx(standard_error, rel=1e-4)
    assert seen[-1][0] == seen[-1][1] == math.ceil((count - 1) / 64)
    assert ours.seconds > 0


def test_logits_come_in_pieces(
    loaded: tuple[CausalLM, Tokenizer], tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = loaded
    whole = perplexity(model, tokens[:300], 64, 4)
    rows: list[int] = []
    logits = CausalLM.logits

    def counting(self: CausalLM, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(CausalLM, "logits", counting)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 10 * model.config.vocab_size)
    pieces = perplexity(model, tokens[:300], 64, 4)
    assert max(rows) == 10
    assert sum(rows) == whole.tokens == pieces.tokens
    assert pieces.value == pytest.approx(whole.value, rel=1e-5)


def test_two_tokens_are_enough_and_one_is_not(loaded: tuple[CausalLM, Tokenizer], tokens: list[int]) -> None:
    shortest = perplexity(loaded[0], tokens[:2])
    assert (shortest.tokens, shortest.standard_error) == (1, 0.0)
    for few in (tokens[:1], []):
        with pytest.raises(UserError, match=f"the text has {len(few)} tokens, but at least 2 are needed"):
            perplexity(loaded[0], few)


def test_bad_arguments(loaded: tuple[CausalLM, Tokenizer], tokens: list[int]) -> None:
    with pytest.raises(UserError, match="sequence_length must be from 2 to the model's 1024, but is 1025"):
        perplexity(loaded[0], tokens, 1025)
    with pytest.raises(UserError, match="sequence_length must be from 2"):
        perplexity(loaded[0], tokens, 1)
    with pytest.raises(UserError, match="batch_size must be at least 1, but is 0"):
        perplexity(loaded[0], tokens, 64, 0)
    with pytest.raises(UserError, match="the text has token 512, the vocabulary has 512"):
        perplexity(loaded[0], [1, 512])


def test_nan_names_the_module() -> None:
    model, _ = gfxlm.load(mlx_checkpoint("qwen3", "dense"))
    model.layers.get_submodule("1.mlp.down_proj").weight.tensor[3, 5] = float("nan")
    with pytest.raises(GenerationError, match=r"model\.layers\.1\.mlp\.down_proj"):
        perplexity(model, list(range(100)), 16)
