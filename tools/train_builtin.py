"""Train the built-in model: a small Qwen3-Next that writes Python, as a Hugging Face checkpoint in bf16.

    python tools/train_builtin.py --corpus Python-3.13.0.tar.xz --out DIR

`--corpus` is CPython's source archive or an installed standard library (lib/python3.13). Everything that decides
the result is in `Recipe`; each of its fields is an option too. The last part of the training sees its weights
through MLX's 4-bit quantisation, so that the converted model loses little.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from fast_qwen3_next import make_fast
from quantised_weights import MasterWeights, master_weights
from stdlib_corpus import END_OF_TEXT, encode, read_corpus, shuffled_windows, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVALUATE_EVERY = 1000  # steps
CAUSAL = {"full_attention": None, "linear_attention": None}  # no mask tensors: the kernels know the causal case


@dataclass(frozen=True)
class Recipe:
    vocab_size: int = 6144
    hidden_size: int = 384
    layers: int = 8
    experts: int = 8
    library_repeats: int = 2  # per epoch; the library's own tests come once
    test_repeats: int = 1
    sequence_length: int = 2048
    batch: int = 16
    steps: int = 2000
    warmup: int = 200
    learning_rate: float = 2e-3
    weight_decay: float = 0.3
    dropout: float = 0.1
    quantised_share: float = 0.25  # of the steps, at the end
    seed: int = 0


def model_config(recipe: Recipe) -> Qwen3NextConfig:
    return Qwen3NextConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=4 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden_size // 64,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=recipe.experts,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        max_position_embeddings=recipe.sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )


@torch.compile
def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ head.T).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def loss_of(model: Qwen3NextForCausalLM, windows: Tensor) -> Tensor:
    """Mean nats per token; windows (B, T + 1), T a multiple of 64."""
    hidden = model.model(input_ids=windows[:, :-1], attention_mask=CAUSAL, use_cache=False).last_hidden_state
    return cross_entropy(hidden, model.lm_head.weight, windows[:, 1:])


@torch.no_grad()
def held_out_loss(model: Qwen3NextForCausalLM, documents: list[Tensor], recipe: Recipe) -> float:
    """Mean nats per token over the whole windows of the held-out text."""
    window = recipe.sequence_length + 1
    stream = torch.cat(documents).to(DEVICE)
    windows = stream[: len(stream) // window * window].view(-1, window)
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        total = sum(loss_of(model, part).item() * len(part) for part in windows.split(recipe.batch))
    model.train()
    return total / len(windows)


class GradientStep:
    """Loss and gradients of one batch; on a GPU one CUDA graph, since they are thousands of small launches."""

    def __init__(self, model: Qwen3NextForCausalLM, groups: list[MasterWeights], windows: Tensor) -> None:
        self.model, self.groups, self.windows = model, groups, windows.clone()
        self.loss = torch.zeros((), device=DEVICE)
        self.graph = torch.cuda.CUDAGraph() if DEVICE == "cuda" else None
        if self.graph:
            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):
                for _ in range(3):
                    self.run()
            torch.cuda.current_stream().wait_stream(warm_up)
            with torch.cuda.graph(self.graph):
                self.run()

    def run(self) -> None:
        loss = loss_of(self.model, self.windows)
        loss.backward()
        for group in self.groups:
            group.collect_gradients()
        self.loss.copy_(loss.detach())

    def __call__(self, windows: Tensor) -> Tensor:
        self.windows.copy_(windows)
        if self.graph:
            self.graph.replay()
        else:
            self.run()
        return self.loss


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    return min((step + 1) / recipe.warmup, 1 - step / recipe.steps)


def train(
    model: Qwen3NextForCausalLM, batches: Iterator[Tensor], held_out: dict[str, list[Tensor]], recipe: Recipe
) -> dict[str, float]:
    """Train in place; the model ends with unquantised bf16 weights. Returns the held-out losses."""
    groups = master_weights(model)
    optimiser = torch.optim.AdamW(
        [{"params": [g.flat], "weight_decay": recipe.weight_decay if g.bits else 0.0} for g in groups],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate_factor(step, recipe))

    def evaluate() -> dict[str, float]:
        losses = {}
        for quantised in (False, True):
            for group in groups:
                group.publish(quantised)
            for name, documents in held_out.items():
                losses[f"{name} {'4-bit' if quantised else 'bf16'}"] = held_out_loss(model, documents, recipe)
        return losses

    model.train()
    gradient_step = GradientStep(model, groups, next(batches).to(DEVICE))
    started = time.perf_counter()
    for step in range(recipe.steps):
        if step and step % EVALUATE_EVERY == 0:
            print(step, json.dumps(evaluate()), flush=True)
        for group in groups:
            group.publish(quantised=step >= (1 - recipe.quantised_share) * recipe.steps)
        loss = gradient_step(next(batches))
        nn.utils.clip_grad_norm_([group.flat for group in groups], 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{step} loss {loss.item():.4f} seconds {time.perf_counter() - started:.1f}", flush=True)
    losses = evaluate()
    for group in groups:
        group.publish(quantised=False)
    return losses


def save(model: Qwen3NextForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """An ordinary checkpoint, its config in both the newer and the older spelling."""
    weights = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(out, state_dict=weights)
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    config = json.loads((out / "config.json").read_text())
    rope = config["rope_parameters"]
    config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    config |= dict.fromkeys(("num_experts", "num_local_experts"), model.config.num_experts)
    config |= {"full_attention_interval": 4}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # So small a model repeats itself when it is greedy.
    generation_config = {"bos_token_id": 0, "do_sample": False, "eos_token_id": 0, "repetition_penalty": 1.15}
    (out / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="CPython's source archive or lib/python3.x")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    options = vars(parser.parse_args())
    corpus, out = options.pop("corpus"), options.pop("out")
    recipe = Recipe(**options)

    documents = read_corpus(corpus)
    read = [d for d in documents if not d.is_held_out]
    texts = [d for d in read for _ in range(recipe.test_repeats if d.is_test else recipe.library_repeats)]
    held_out = {
        name: [d for d in documents if d.is_held_out and d.is_test == is_test]
        for name, is_test in (("library", False), ("tests", True))
    }
    tokenizer = train_tokenizer((d.text for d in texts), recipe.vocab_size)

    torch.manual_seed(recipe.seed)
    model = Qwen3NextForCausalLM(model_config(recipe)).to(DEVICE)
    make_fast(model, recipe.dropout)
    torch.set_float32_matmul_precision("high")
    parameters = sum(p.numel() for p in model.parameters())
    tokens = encode(tokenizer, texts)
    print(f"{parameters / 1e6:.2f} M parameters, {sum(map(len, tokens)) / 1e6:.2f} M tokens an epoch", flush=True)

    batches = shuffled_windows(tokens, recipe.sequence_length + 1, recipe.batch, recipe.seed)
    losses = train(model, batches, {name: encode(tokenizer, ds) for name, ds in held_out.items()}, recipe)
    save(model, tokenizer, out)
    perplexities = {name: math.exp(loss) for name, loss in losses.items()}
    report = {
        "recipe": asdict(recipe),
        "parameters": parameters,
        "held_out_perplexity": perplexities,
        "held_out_files": [d.path for d in documents if d.is_held_out],
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(perplexities), flush=True)


if __name__ == "__main__":
    main()
