"""What all decoder models share: embeddings, pre-norm layers, output head, caches, and the ragged forward pass."""

import copy
import json
from abc import abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gfxlm.errors import UserError
from gfxlm.kernels.tuning import config
from gfxlm.models.config import ModelConfig
from gfxlm.nn.attention import Attention
from gfxlm.nn.cache import Cache, Identity, KVCache, KVFormat, LayerCache, QuantizedKVCache, RecurrentCache, kv_format
from gfxlm.nn.context import Context
from gfxlm.nn.delta_net import GatedDeltaNet
from gfxlm.nn.linear import Embedding, Linear
from gfxlm.nn.module import Module, ModuleList
from gfxlm.nn.norm import RMSNorm
from gfxlm.nn.pages import Pages
from gfxlm.nn.ring import Ring, Turned
from gfxlm.nn.rope import RoPE
from gfxlm.ops.ragged import Slots, ragged
from gfxlm.weights.safetensors_file import LazyTensor
from gfxlm.weights.source import WeightSource
from gfxlm.weights.weight import Weight

Tensors = dict[str, LazyTensor]

# Of the first row of each matrix, to know a model again.
_SAMPLED_FEATURES = 8


class DecoderLayer(Module):
    """`h = x + mixer(norm(x)); y = h + mlp(norm(h))`. The mixer has the attribute name that the checkpoint gives it."""

    def __init__(self, config: ModelConfig, mixer: Attention | GatedDeltaNet, mlp: Module) -> None:
        super().__init__()
        # Norms are loaded first: a wrong hidden size then shows as what it is, not as a strange matrix.
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer_name = "self_attn" if isinstance(mixer, Attention) else "linear_attn"
        self.add_module(self.mixer_name, mixer)
        self.mlp = mlp
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def mixer(self) -> Attention | GatedDeltaNet:
        """Attention or gated delta net."""
        mixer = self.get_submodule(self.mixer_name)
        assert isinstance(mixer, Attention | GatedDeltaNet)
        return mixer

    def forward(self, x: Tensor, context: Context, cache: LayerCache) -> Tensor:  # (N, hidden) -> (N, hidden)
        x = self.mixer(self.input_layernorm(x), context, cache, x)
        return self.mlp(self.post_attention_layernorm(x), x, context.slots)


class Decoder(Module):
    """Token embeddings, the layers, and the last norm."""

    def __init__(self, config: ModelConfig, layers: list[DecoderLayer], rope: RoPE) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = ModuleList(list(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = rope

    def forward(self, tokens: Tensor, positions: Tensor, slots: Slots, cache: Cache) -> Tensor:
        # A recorded chunk is fed no more than the ring has room for: there is nothing to turn.
        turned = None if cache.ring is None or slots.batch is not None else Turned.of(cache.ring, positions, slots)
        cos, sin = self.rope(positions)
        context = Context(positions, slots, cos, sin, turned)
        x = self.embed_tokens(tokens)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, context, layer_cache)
        return self.norm(x)


class CausalLM(Module):
    """A decoder with an output head. A family says what its layers are and how foreign checkpoints are renamed."""

    Config: ClassVar[type[ModelConfig]] = ModelConfig

    def __init__(self, config: ModelConfig, *, tied: bool) -> None:
        super().__init__()
        self.config = config
        self.tied = tied
        self.generation_config: dict[str, Any] = {}
        self.kv_format: KVFormat | None = None
        self.max_kv_size: int | None = None
        self.memory_limit: int | None = None  # bytes that this process may take on the model's device
        layers = [self.make_layer(config, number) for number in range(config.num_hidden_layers)]
        self.model = Decoder(config, layers, self.make_rope(config))
        if not tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @staticmethod
    @abstractmethod
    def make_layer(config: Any, number: int) -> DecoderLayer:
        """The decoder layer of that number."""

    @staticmethod
    def make_rope(config: Any) -> RoPE:
        """The rotary embedding; families with partial rotation override it."""
        return RoPE(config.head_size, config.rope_theta, config.rope_scaling, config.max_position_embeddings)

    @staticmethod
    def sanitize(tensors: Tensors, config: Any) -> Tensors:
        """Rename and reshape a transformers checkpoint's tensors to MLX's; MLX's own pass unchanged."""
        return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}

    @staticmethod
    def router_quantization(path: str) -> tuple[int, int] | None:
        """(group_size, bits) of a matrix that is never quantised as coarsely as the rest, None for all others."""
        return None

    @property
    def layers(self) -> ModuleList:
        """The decoder layers, as mlx-lm names them."""
        return self.model.layers

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices, as they lie in memory."""
        held = (value for module in self.modules() for value in vars(module).values())
        return sum(value.nbytes for value in held if isinstance(value, Weight))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations."""
        return self.model.norm.weight.dtype

    def load(self, source: WeightSource, path: str = "") -> None:
        super().load(source, path)
        self.eval().requires_grad_(False)

    def forward(self, tokens: Tensor, positions: Tensor, slots: Slots, cache: Cache) -> Tensor:
        """Run a flattened ragged batch: tokens and positions int64 (N,), caches updated in place.

        Returns the normed hidden states (N, hidden_size): `logits` of the rows that need them is a product of its own.
        Reads nothing back to the host and branches on no tensor's value.
        """
        hidden: Tensor = self.model(tokens, positions, slots, cache)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., hidden_size) to (..., vocab_size)."""
        if self.tied:
            return self.model.embed_tokens.as_linear(hidden)
        scores: Tensor = self.lm_head(hidden)
        return scores

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) of sequences (B, T), as in mlx-lm. With a cache, the tokens continue what its slots hold."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens: expected (B, T), got shape {tuple(tokens.shape)}")
        batch, length = tokens.shape
        if tokens.numel() == 0:
            return torch.empty(batch, length, self.config.vocab_size, dtype=self.dtype, device=self.device)
        if cache is None:
            cache = self.make_cache(batch, length)
        if batch > len(cache.lengths):
            raise ValueError(f"tokens: {batch} sequences, but the cache has {len(cache.lengths)} slots")
        offsets = cache.lengths[:batch]
        if not all(cache.reserve(slot, offset + length) for slot, offset in enumerate(offsets)):
            raise UserError(f"{max(offsets) + length} positions do not fit into a cache of {cache.max_context}")
        positions, slots = ragged(range(batch), [length] * batch, offsets, self.device)
        hidden = self.forward(tokens.flatten().long().to(self.device), positions, slots, cache)
        cache.lengths[:batch] = [offset + length for offset in offsets]
        return self.logits(hidden).view(batch, length, -1)

    def make_cache(
        self, slots: int, max_context: int, *, pool_positions: int | None = None, paged: bool = False
    ) -> Cache:
        """Empty caches of fixed address for `slots` sequences of up to `max_context` positions.

        Where `pool_positions` are fewer than all of these, slots share them in pages, of which one is nobody's: a
        sequence has as much of the context as is reserved for it, and `Cache.max_context` is what one alone can have.
        Else each slot has its own, unless they are to be `paged`: that is the same memory, and addresses are simpler.
        With a `max_kv_size` below that, keys and values have so many places, and longer texts go round in them.
        Raises UserError for more positions than a "dynamic" rotary embedding stays the same for.
        """
        limit = self.model.rope.limit
        if limit is not None and max_context > limit:
            raise UserError(f"rope_scaling: type 'dynamic' is not supported beyond the {limit} positions of training")
        places = min(max_context, self.max_kv_size or max_context)
        pages = None
        if pool_positions is not None and (paged or pool_positions < slots * places):
            size = page_size(self.device)
            count = max(2, pool_positions // size)
            if (count - 1) * size < places:
                max_context = places = (count - 1) * size
            pages = Pages(slots, places, size, count, self.device)
        room = (slots, places, self.device, self.dtype)
        layers = [self._layer_cache(layer, *room, self.kv_format, pages) for layer in self.layers]
        ring = Ring(places) if places < max_context else None
        # A function, so that a copy of the cache is no copy of the model.
        return Cache(layers, [0] * slots, max_context, lambda: self.identity, pages, ring)

    def cache_bytes(self, dtype: torch.dtype, format: KVFormat | None = None) -> tuple[int, int]:
        """Bytes of a position's keys and values, and of a sequence's recurrent state. Needs no weights.

        UserError where a head does not divide into the format's groups.
        """
        meta = torch.device("meta")
        layers = [self._layer_cache(layer, 1, 1, meta, dtype, format) for layer in self.layers]
        sizes = [(isinstance(x, RecurrentCache), sum(tensor.nbytes for tensor in x.tensors)) for x in layers]
        return sum(n for recurrent, n in sizes if not recurrent), sum(n for recurrent, n in sizes if recurrent)

    def with_quantized_kv(self, bits: int = 8, group_size: int = 64) -> Self:
        """The same model over the same weights, whose caches, an `Engine`'s too, hold codes of 4 or 8 bits.

        Recurrent layers keep their fp32 state. UserError for other bits, for groups of other than 32, 64 or 128
        features, and where a head does not divide into groups.
        """
        view = copy.copy(self)
        view.kv_format = KVFormat(bits, group_size)
        for mixer in self._mixers():
            if isinstance(mixer, Attention):
                view.kv_format.check(mixer.head_dim)
        return view

    def with_rotating_kv(self, max_kv_size: int) -> Self:
        """The same model over the same weights, whose caches hold keys and values of so many positions at a time.

        Those are the first few of a text and its newest: see `Ring`. Recurrent layers remember as they always do.
        UserError for a size that is too small, and for layers that slide a window of their own that is smaller.
        """
        ring = Ring(max_kv_size)
        windows = [mixer.window for mixer in self._mixers() if isinstance(mixer, Attention) and mixer.window]
        if windows and min(windows) < ring.size:
            raise UserError(
                f"max_kv_size is {max_kv_size}, but layers of this model see only their last {min(windows)} positions; "
                "the two do not go together"
            )
        view = copy.copy(self)
        view.max_kv_size = ring.size
        return view

    @property
    def identity(self) -> Identity:
        """What tells this model from others, wherever it runs."""
        held = (value for module in self.modules() for value in vars(module).values())
        matrices = [value for value in held if isinstance(value, Weight) and len(value.shape) == 2]
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        rows = [matrix.rows(first)[0, :_SAMPLED_FEATURES].float() for matrix in matrices]
        return Identity(json.dumps(asdict(self.config), sort_keys=True), torch.stack(rows).cpu())

    def check_cache(self, cache: Cache) -> None:
        """Raise UserError unless the cache's layers have this model's kinds, shapes and types."""
        if len(cache.layers) != len(self.layers):
            raise UserError(f"the cache has {len(cache.layers)} layers, the model {len(self.layers)}: it is another's")
        for number, (theirs, layer) in enumerate(zip(cache.layers, self.layers, strict=True)):
            ours = self._layer_cache(layer, 1, 1, torch.device("meta"), self.dtype, kv_format(theirs))
            if _summary(theirs) != _summary(ours):
                raise UserError(
                    f"the cache is another model's: its layer {number} is a {_summary(theirs)}, not a {_summary(ours)}"
                )

    def _mixers(self) -> list[Attention | GatedDeltaNet]:
        return [layer.mixer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @staticmethod
    def _layer_cache(
        layer: nn.Module,
        slots: int,
        max_context: int,
        device: torch.device,
        dtype: torch.dtype,
        format: KVFormat | None,
        pages: Pages | None = None,
    ) -> LayerCache:
        assert isinstance(layer, DecoderLayer)
        mixer = layer.mixer
        if isinstance(mixer, GatedDeltaNet):
            return RecurrentCache(
                torch.zeros(slots, mixer.kernel, mixer.channels, dtype=dtype, device=device),
                torch.zeros(slots, mixer.v_heads, mixer.v_dim, mixer.k_dim, device=device),
            )
        shape = (slots, max_context, mixer.kv_heads, mixer.head_dim)
        if format is None:
            return KVCache.allocate(*shape, dtype, device, pages=pages)
        bits, group_size = format.bits, format.group_size
        return QuantizedKVCache.allocate(*shape, dtype, device, bits=bits, group_size=group_size, pages=pages)


def page_size(device: torch.device) -> int:
    """Positions of a page, by the architecture's table."""
    size: int = config("pages", device)["page_size"]
    return size


def _summary(layer: LayerCache) -> str:
    """A layer's kind, and the shapes and types of what it holds of a position or a sequence."""
    skipped = 1 if isinstance(layer, RecurrentCache) else 2
    held = (f"{list(x.shape[skipped:])} {str(x.dtype).removeprefix('torch.')}" for x in layer.tensors)
    return f"{type(layer).__name__} of {', '.join(held)}"
