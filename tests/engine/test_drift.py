"""A long answer does not drift: reading it all at once gives the scores with which it was written, to its end."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import gfxlm
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import built_in_folder
from gfxlm.engine.params import SamplingParams
from gfxlm.models.base import CausalLM

PROMPT = list(range(100, 120))
# The built-in model's layers, the roundings one after the other in each, and the addends of its longest sums.
LAYERS, ROUNDINGS, ADDENDS = 8, 10, 1536


def tolerance(dtype: torch.dtype) -> float:
    """Of log probabilities, in their standard deviations: roundings are random, so that their squares add up.

    In fp32 each addend of a sum is rounded; products of bf16 are summed in fp32, and only the results are rounded.
    """
    addends = ADDENDS if dtype == torch.float32 else 1
    return torch.finfo(dtype).eps / 2 * float(LAYERS * ROUNDINGS * addends) ** 0.5


def written(model: CausalLM, length: int) -> tuple[list[int], Tensor]:
    """An answer that the engine makes up token by token, and the log probabilities (length, V) of every one."""
    engine = Engine(model, max_context=len(PROMPT) + length, overlap=True)
    request = engine.add(PROMPT, SamplingParams(max_tokens=length, temperature=1.0, seed=1, logprobs=True))
    logprobs = []
    while engine.busy:
        for answered in engine.step():
            assert answered.logprobs is not None
            logprobs.append(answered.logprobs)
    assert request.error is None
    return request.tokens, torch.stack(logprobs).float().cpu()


def read(model: CausalLM, tokens: list[int]) -> Tensor:
    """The log probabilities (length, V) that prefill gives the same answer."""
    text = torch.tensor([PROMPT + tokens], device=model.device)
    cache = model.make_cache(1, text.shape[1])
    logits = [model(part, cache)[0].float().cpu() for part in text.split(512, dim=1)]
    return torch.cat(logits)[len(PROMPT) - 1 : -1].log_softmax(-1)


def check(model: CausalLM, length: int) -> None:
    tokens, ours = written(model, length)
    assert len(tokens) == length
    expected = read(model, tokens)
    errors = (ours - expected).square().mean(-1).sqrt() / expected.std()  # (length,)
    tenths = [part.median().item() for part in errors.chunk(10)]
    print(f"{model.dtype} {model.device}: medians {min(tenths):.1e} to {max(tenths):.1e}, most {errors.max():.1e}")
    assert max(tenths) <= tolerance(model.dtype)
    # Nothing adds up: the last tenth of the answer is as exact as the first.
    assert tenths[-1] <= 2 * tenths[0]
    # A token whose two best experts are as good as equal may get the other one; that is rare, and forgotten.
    assert errors.quantile(0.99) <= 10 * tolerance(model.dtype)


def test_answer_on_a_cpu(tmp_path: Path) -> None:
    folder = tmp_path / "dense"  # on a CPU the fastest form in fp32
    gfxlm.convert(built_in_folder(), folder, dequantize=True)
    check(gfxlm.load(folder, device="cpu", dtype=torch.float32)[0], 600)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_thousand_tokens_on_a_gpu(dtype: torch.dtype) -> None:
    check(gfxlm.load("builtin", device="cuda", dtype=dtype)[0], 10_000)
