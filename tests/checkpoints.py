"""Small checkpoints of every family, made with transformers and mlx-lm as a user would make them."""

import atexit
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx_lm
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_ROOT = Path(mkdtemp(prefix="gfxlm-tests-"))
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON | {"sliding_window": None},
    "qwen2": {**{k: v for k, v in _COMMON.items() if k != "head_dim"}, "tie_word_embeddings": True},
    "qwen3": _COMMON | {"tie_word_embeddings": True},
    "qwen3_moe": _COMMON | _EXPERTS,
    "qwen3_next": _COMMON
    | _EXPERTS
    | {
        "num_hidden_layers": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 128,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
    },
}

CORPUS = "\n".join(
    f"def add_{n}(x):\n    return x + {n}  # plus {n}, ünïcode 漢字 {chr(0x1F600 + n)}" for n in range(40)
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([CORPUS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@cache
def transformers_checkpoint(family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A randomly initialised model of the family, saved by transformers with a tokenizer, in both config spellings."""
    torch.manual_seed(7)
    settings = FAMILIES[family]
    config = AutoConfig.for_model(family, **settings, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        # Large enough for attention, gates and routers to have an opinion.
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif "norm" in name or "bias" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = _ROOT / f"{family}-{dtype}"
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def mlx_checkpoint(family: str, recipe: str = "4bit", dtype: torch.dtype = torch.bfloat16) -> Path:
    """The same model converted by mlx-lm: "dense", "4bit", "8bit", "3bit-32", a mode, or a mixed recipe."""
    folder = _ROOT / f"{family}-{recipe}-{dtype}"
    if folder.exists():
        return folder
    options: dict[str, Any] = {"quantize": recipe != "dense"}
    if recipe.startswith("mixed"):
        options |= {"quant_predicate": recipe, "q_group_size": 64}
    elif recipe in ("mxfp4", "mxfp8", "nvfp4"):
        options["q_mode"] = recipe
    elif recipe != "dense":
        bits, _, group_size = recipe.partition("bit")
        options |= {"q_bits": int(bits), "q_group_size": int(group_size.strip("-") or 64)}
    mlx_lm.convert(str(transformers_checkpoint(family, dtype)), str(folder), **options)
    return folder
