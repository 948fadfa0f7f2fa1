"""Speed on the CPU, against MLX on the same CPU: a random 256 M-parameter qwen3 in 4-bit, pp512 and tg64.

    python benchmarks/cpu_against_mlx.py [--prompt 512] [--tokens 64]

Needs the test extra. MLX takes minutes for its prompt.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import torch
from mlx_lm.models.cache import make_prompt_cache
from transformers import AutoConfig, AutoModelForCausalLM

import gfxlm
from gfxlm.models.load import load_model
from gfxlm.weights.checkpoint import Checkpoint

SETTINGS = {
    "hidden_size": 1024,
    "num_hidden_layers": 14,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def make_checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **SETTINGS, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    print(f"qwen3, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    source, target = folder / "hf", folder / "mlx"
    model.save_pretrained(source)
    gfxlm.convert(source, target, quantize=True)
    return target


def time_ours(folder: Path, prompt: list[int], tokens: int) -> tuple[float, float]:
    model = load_model(Checkpoint.open(folder))
    engine_tokens: list[float] = []
    for _ in range(3):  # the last run counts
        engine = gfxlm.Engine(model, max_context=len(prompt) + tokens)
        request = engine.add(prompt, gfxlm.SamplingParams(max_tokens=tokens + 1))
        engine_tokens = [time.perf_counter()]
        while request.finish_reason is None:
            engine.step()
            engine_tokens.append(time.perf_counter())
    start, first, *_, last = engine_tokens
    return len(prompt) / (first - start), tokens / (last - first)


def time_mlx(folder: Path, prompt: list[int], tokens: int) -> tuple[float, float]:
    model, _ = mlx_lm.utils.load_model(folder)
    cache = make_prompt_cache(model)
    start = time.perf_counter()
    token = model(mx.array([prompt]), cache=cache)[:, -1].argmax(-1)
    mx.eval(token)
    first = time.perf_counter()
    for _ in range(tokens):
        token = model(token[None], cache=cache)[:, -1].argmax(-1)
        mx.eval(token)
    return len(prompt) / (first - start), tokens / (time.perf_counter() - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_checkpoint(Path(scratch))
        prompt = torch.randint(0, SETTINGS["vocab_size"], (args.prompt,)).tolist()
        ours = time_ours(folder, prompt, args.tokens)
        theirs = time_mlx(folder, prompt, args.tokens)
    names = (f"pp{args.prompt}", f"tg{args.tokens}")
    for name, mine, other in zip(names, ours, theirs, strict=True):
        print(
            json.dumps({"test": name, "gfxlm": round(mine, 2), "mlx": round(other, 2), "ratio": round(mine / other, 1)})
        )


if __name__ == "__main__":
    main()
