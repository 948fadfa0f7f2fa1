"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on q, k and v."""

from dataclasses import dataclass
from typing import ClassVar

from gfxlm.models.base import CausalLM, DecoderLayer
from gfxlm.models.config import ModelConfig
from gfxlm.nn.attention import Attention
from gfxlm.nn.mlp import GatedMLP


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(ModelConfig):
    """Nothing of its own but how positions turn."""

    rope_theta: float = 1_000_000.0
    rope_traditional: bool = False


class Qwen2(CausalLM):
    """The Qwen2 family."""

    Config: ClassVar[type[ModelConfig]] = Qwen2Config

    @staticmethod
    def make_layer(config: Qwen2Config, number: int) -> DecoderLayer:
        attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            config.head_size,
            qkv_bias=True,
            traditional_rope=config.rope_traditional,
        )
        return DecoderLayer(config, attention, GatedMLP(config.hidden_size, config.intermediate_size))
