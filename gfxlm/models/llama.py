"""Llama (arXiv 2302.13971, 2407.21783) and Mistral: attention with rotary positions, a gated MLP."""

from dataclasses import dataclass
from typing import ClassVar

from gfxlm.models.base import CausalLM, DecoderLayer
from gfxlm.models.config import ModelConfig, require
from gfxlm.nn.attention import Attention
from gfxlm.nn.mlp import GatedMLP


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A layer slides a window over its keys only where `layer_types` says so."""

    attention_bias: bool = False
    mlp_bias: bool = False
    rope_traditional: bool = False
    layer_types: list[str] | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_types is not None:
            layers, kinds = self.num_hidden_layers, ("full_attention", "sliding_attention")
            require(
                len(self.layer_types) == layers, f"layer_types has {len(self.layer_types)} entries for {layers} layers"
            )
            for kind in self.layer_types:
                require(kind in kinds, f"layer_types: {kind!r} is not one of {', '.join(kinds)}")

    def window(self, number: int) -> int | None:
        """How many positions back the layer of that number sees, None for all of them."""
        sliding = self.layer_types is not None and self.layer_types[number] == "sliding_attention"
        return self.sliding_window if sliding else None


class Llama(CausalLM):
    """The Llama family."""

    Config: ClassVar[type[ModelConfig]] = LlamaConfig

    @staticmethod
    def make_layer(config: LlamaConfig, number: int) -> DecoderLayer:
        attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            config.head_size,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            window=config.window(number),
            traditional_rope=config.rope_traditional,
        )
        return DecoderLayer(
            config, attention, GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        )
