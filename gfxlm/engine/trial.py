"""A model's layers, step by step, on its device, each step held against float64.

How far a step may be off is not guessed: `engine.reference` computes it twice, once exactly and once with all that a
kernel may round moved at random by as much as rounding would.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gfxlm.engine.params import SamplingParams
from gfxlm.engine.reference import Arithmetic, DeltaInputs, Formula, distribution, matrix, numbers
from gfxlm.engine.sampler import Sampler
from gfxlm.models.base import CausalLM, DecoderLayer, page_size
from gfxlm.nn.attention import Attention
from gfxlm.nn.cache import Cache, KVCache, LayerCache, RecurrentCache
from gfxlm.nn.context import Context
from gfxlm.nn.delta_net import GatedDeltaNet
from gfxlm.nn.linear import Linear, MergedLinear
from gfxlm.nn.mlp import GatedMLP, SparseMoE
from gfxlm.nn.norm import RMSNorm
from gfxlm.ops import DeltaWeights, cached_attention, gated_delta_mixer
from gfxlm.ops.kv import read, write_qkv
from gfxlm.ops.moe import SharedExpert, route
from gfxlm.ops.ragged import Slots, ragged

# Enough rows for the widest kind of product and for more than one chunk of the delta rule; and so few as to be skinny.
PROMPT, _FEW = 72, 24
_OUTPUTS = 512  # of a product, spread over all of them
_EXPERT_ROWS = 3  # of the prompt: each takes some experts' matrices as float64
# What rounding does is random; its size over many outputs is not. Kernels round in other places than the yardstick.
_MARGIN, _LARGEST_MARGIN = 1.5, 3.0
_THROWS, _THROWN = 4, 256  # times, and outputs of a row in all, that rounding is thrown for
_POSITIONS = 64
_FP32 = 2.0**-21  # of results in fp32, after some steps
DRAWS, VOCABULARY = 3072, 1500
PAGED = 512  # positions of a cache in pages
_SIGMAS = 5.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A step of a layer whose numbers are wrong."""

    place: str  # model.layers.3.self_attn
    kind: str  # linear, experts, attention, gated delta, norm, rotary, embedding, layer, sampling
    rows: int
    error: float  # as a multiple of what rounding may do; inf for what is no number

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}, {self.rows} rows, off by {self.error:.3g} times what rounding may do"


class Trial:
    """The device's results so far, judged."""

    def __init__(self, model: CausalLM) -> None:
        self.model, self.device = model, model.device
        self.faults: list[Fault] = []
        # Products of 16-bit numbers are summed in fp32 and rounded once; in fp32 each addend is.
        addends = model.config.hidden_size if model.dtype == torch.float32 else 1
        self._unit = torch.finfo(model.dtype).eps / 2 * addends**0.5
        self._least = torch.finfo(model.dtype).tiny * torch.finfo(model.dtype).eps  # a step of the smallest numbers
        tokens = torch.arange(PROMPT + 1) * 7919 % model.config.vocab_size
        embedding = model.model.embed_tokens
        self._slow: RecurrentCache
        self.x = embedding(tokens.to(self.device))
        table = matrix(embedding.weight, tokens)
        self.judge("model.embed_tokens", "embedding", self.x, lambda a: a.round(table))

    def judge(self, place: str, kind: str, actual: Tensor, formula: Formula, *, unit: float | None = None) -> None:
        """Hold a result of the device against its formula."""
        self.judge_all(place, kind, (actual,), lambda a: (formula(a),), unit)

    def judge_all(
        self,
        place: str,
        kind: str,
        actual: tuple[Tensor, ...],
        formula: Callable[[Arithmetic], tuple[Tensor, ...]],
        unit: float | None = None,
    ) -> None:
        """The same of several results that have one formula."""
        exact, rounding = formula(Arithmetic()), Arithmetic(self._unit if unit is None else unit)
        throws = max(_THROWS, *(-(-_THROWN // x[0].numel()) for x in exact))
        thrown = [formula(rounding) for _ in range(throws)]
        for number, (ours, wanted) in enumerate(zip(actual, exact, strict=True)):
            noise = torch.cat([(throw[number] - wanted).flatten(1) for throw in thrown], 1)
            error = _excess((numbers(ours) - wanted).flatten(1), noise, self._least)
            if error > 1:
                self.faults.append(Fault(place, kind, len(ours), error))

    def layer(self, number: int, layer: DecoderLayer) -> None:
        """A prompt through a layer, then one token more."""
        place = f"model.layers.{number}"
        plain, whole = (self.model.make_cache(1, PROMPT + 1).layers[number] for _ in range(2))
        paged = paged_cache(self.model)
        paged.reserve(0, PROMPT + 1)
        caches = plain, paged.layers[number]
        for first, last in ((0, PROMPT), (PROMPT, PROMPT + 1)):
            x = self.x[first:last]
            context = self._context(first, last)
            normed = self._norm(f"{place}.input_layernorm", layer.input_layernorm, x)
            h = self._mixer(f"{place}.{layer.mixer_name}", layer.mixer, normed, context, caches, x, first)
            normed = self._norm(f"{place}.post_attention_layernorm", layer.post_attention_layernorm, h)
            steps = numbers(self._block(f"{place}.mlp", layer.mlp, normed, h, context.slots))
            self.judge(place, "layer", layer(x, context, whole), _twice_rounded(steps))

    def angles(self) -> None:
        """Cosines and sines, to the end of the context."""
        rope = self.model.model.rope
        last = self.model.config.max_position_embeddings - 1
        positions = torch.linspace(0, last, _POSITIONS).long()
        angles = positions.double()[:, None] * rope.position_scale / numbers(rope.freqs)
        cos, sin = (numbers(x[:, 0]) / rope.magnitude for x in rope(positions.to(self.device)))
        # Angles are fp32: their rounding grows with them.
        bound = 4 * torch.finfo(torch.float32).eps * (1 + angles.abs())
        worst = max(
            float(((got - exact).abs() / bound).max()) for got, exact in ((cos, angles.cos()), (sin, angles.sin()))
        )
        if not worst <= 1:
            self.faults.append(Fault("model.rope", "rotary", _POSITIONS, worst if worst == worst else torch.inf))

    def head(self) -> None:
        """The last norm, and scores of some tokens."""
        model, tied = self.model, self.model.tied
        hidden = self._norm("model.norm", model.model.norm, self.x[:_FEW])
        weight = model.model.embed_tokens.weight if tied else model.lm_head.weight
        some = _spread(weight.shape[0])
        dense = matrix(weight, some)
        for rows in (1, _FEW):
            scores, x = model.logits(hidden[:rows])[:, some.to(self.device)], numbers(hidden[:rows])
            self.judge("lm_head", "linear", scores, lambda a, x=x: a.product(x, dense))  # type: ignore[misc]

    def sampling(self) -> None:
        """The likeliest token of real scores, and how often tokens are drawn, through each of the filters."""
        logits = self.model.logits(self.model.model.norm(self.x[:4]))
        tokens, best = self._sampled(logits, SamplingParams()), logits.float().amax(-1)
        if not bool((logits.float().gather(1, tokens.clamp(min=0)[:, None])[:, 0] == best).all()):
            self.faults.append(Fault("sampler", "sampling", len(logits), torch.inf))
        ranks = torch.arange(VOCABULARY) * 7 % VOCABULARY
        scores = -0.1 * ranks.float()
        drawn_from = scores.to(self.device).expand(DRAWS, -1)
        plain = SamplingParams(temperature=0.7, seed=1)
        filtered = [replace(plain, top_p=0.8), replace(plain, top_k=9), replace(plain, min_p=0.3)]
        for slots in ([plain], filtered):
            tokens = self._sampled(drawn_from, *slots).cpu()
            for number, params in enumerate(slots):
                worst = _improbability(tokens[number :: len(slots)], distribution(scores.double(), params))
                if worst > 1:
                    self.faults.append(Fault("sampler", "sampling", DRAWS // len(slots), worst))

    def _sampled(self, logits: Tensor, *params: SamplingParams) -> Tensor:
        """A token for each row, whose parameters take turns."""
        sampler = Sampler(len(params), logits.shape[1], self.device)
        for slot, given in enumerate(params):
            sampler.set(slot, given)
        rows = torch.arange(len(logits), device=self.device)
        tokens = sampler.sample(logits, rows % len(params), rows).tokens
        return tokens

    def _mixer(
        self,
        place: str,
        mixer: Attention | GatedDeltaNet,
        x: Tensor,
        context: Context,
        caches: tuple[LayerCache, LayerCache],
        residual: Tensor,
        first: int,
    ) -> Tensor:
        if isinstance(mixer, GatedDeltaNet):
            assert isinstance(caches[0], RecurrentCache)
            return self._delta(place, mixer, x, context, caches[0], residual, first)
        parts = self._linear(f"{place}.qkv_proj", mixer.qkv_proj, x)
        outputs = [self._attention(place, mixer, parts, context, cache, first) for cache in caches]
        return self._linear(f"{place}.o_proj", mixer.o_proj, outputs[0].flatten(-2), residual)[0]

    def _block(self, place: str, mlp: torch.nn.Module, x: Tensor, residual: Tensor, slots: Slots) -> Tensor:
        if isinstance(mlp, SparseMoE):
            return self._experts(place, mlp, x, residual, slots)
        assert isinstance(mlp, GatedMLP)
        return self._mlp(place, mlp, x, residual)

    def _attention(
        self,
        place: str,
        attention: Attention,
        parts: tuple[Tensor, ...],
        context: Context,
        cache: LayerCache,
        first: int,
    ) -> Tensor:
        """Queries, keys and values (N, ...) through a cache of either kind: (N, Hq, D)."""
        assert not isinstance(cache, RecurrentCache)
        heads = (attention.heads, attention.kv_heads, attention.kv_heads)
        q, k, v = (part.unflatten(-1, (count, -1)) for part, count in zip(parts, heads, strict=True))
        gate = None
        if attention.gated:
            q, gate = q.chunk(2, dim=-1)
        norms = (attention.q_norm.weight, attention.k_norm.weight) if attention.has_qk_norm else None
        eps = attention.q_norm.eps if attention.has_qk_norm else 0.0
        turned = write_qkv(
            q, k, v, cache.keys, cache.values, context.positions, context.slots,
            cos=context.cos, sin=context.sin, norms=norms, eps=eps,
            traditional=attention.traditional_rope, pages=cache.table,
        )  # fmt: skip
        last = first + len(q)
        keys, values = (numbers(read(store, 0, 0, last, cache.table)) for store in (cache.keys, cache.values))
        cos, sin = numbers(context.cos), numbers(context.sin)

        def rotated(a: Arithmetic, heads: Tensor, number: int) -> Tensor:
            wide = numbers(heads)
            wide = wide if norms is None else a.norm(wide, numbers(norms[number]), eps)
            return a.rotated(wide, cos, sin, attention.traditional_rope)

        self.judge(place, "rotary", turned, lambda a: rotated(a, q, 0))
        if isinstance(cache, KVCache):
            self.judge(place, "rotary", keys[first:], lambda a: rotated(a, k, 1))
            self.judge(place, "attention", values[first:], lambda a: numbers(v))
        scale, window = attention.head_dim**-0.5, attention.window
        out = cached_attention(
            turned, cache.keys, cache.values, context.positions, context.slots,
            scale=scale, window=window, gate=gate, pages=cache.table,
        )  # fmt: skip
        query, gates = numbers(turned), None if gate is None else numbers(gate)
        self.judge(
            place, "attention", out, lambda a: a.attention(query, keys, values, scale=scale, window=window, gate=gates)
        )
        return out

    def _delta(
        self,
        place: str,
        net: GatedDeltaNet,
        x: Tensor,
        context: Context,
        cache: RecurrentCache,
        residual: Tensor,
        first: int,
    ) -> Tensor:
        qkvz, ba = self._linear(f"{place}.in_proj", net.in_proj, x)
        y = self._mixed(place, net, qkvz, ba, context, cache, first)
        if first == 0:
            self._slow = RecurrentCache(torch.zeros_like(cache.conv), torch.zeros_like(cache.state))
        # A layer that forgets at once, as some do on such a prompt, would hide what is wrong with its memory.
        self._mixed(place, net, qkvz, _remembering(ba, net), context, self._slow, first)
        return self._linear(f"{place}.out_proj", net.out_proj, y, residual)[0]

    def _mixed(
        self,
        place: str,
        net: GatedDeltaNet,
        qkvz: Tensor,
        ba: Tensor,
        context: Context,
        cache: RecurrentCache,
        first: int,
    ) -> Tensor:
        weights = DeltaWeights(net.conv_weight, net.A_log, net.dt_bias, net.norm_weight, net.eps, net.k_heads)
        given = DeltaInputs(numbers(qkvz), numbers(ba), numbers(cache.conv[0]), numbers(cache.state[0]), first)
        y = gated_delta_mixer(qkvz, ba, weights, context.positions, context.slots, cache.conv, cache.state)
        self.judge_all(place, "gated delta", (y, cache.state[0]), lambda a: a.delta(given, weights))
        return y

    def _mlp(self, place: str, mlp: GatedMLP, x: Tensor, residual: Tensor) -> Tensor:
        merged = mlp.gate_up_proj
        inner = merged.weight.shape[0] // 2
        some = _spread(inner)
        both = torch.cat((some, inner + some))
        dense, bias = matrix(merged.weight, both), _picked(merged.bias, both)

        def formula(a: Arithmetic, x: Tensor) -> Tensor:
            return a.swiglu(*a.product(x, dense, bias).chunk(2, -1))

        hidden = x[:0]
        for rows in sorted({min(_FEW, len(x)), len(x)}):
            hidden, wide = merged.swiglu(x[:rows]), numbers(x[:rows])
            picked = hidden[:, some.to(self.device)]
            self.judge(f"{place}.gate_up_proj", "linear", picked, lambda a, wide=wide: formula(a, wide))  # type: ignore[misc]
        return self._linear(f"{place}.down_proj", mlp.down_proj, hidden, residual)[0]

    def _experts(self, place: str, moe: SparseMoE, x: Tensor, residual: Tensor, slots: Slots) -> Tensor:
        logits, *shared_logits = self._linear(f"{place}.gate", moe.gate, x)
        chosen, scores = route(logits, moe.top_k, normalize=moe.normalize, slots=slots.index)
        self._routing(f"{place}.gate", moe, numbers(logits), chosen.cpu(), scores)
        shared = None
        if moe.has_shared_expert:
            mlp = moe.shared_expert
            shared = SharedExpert(mlp.gate_up_proj.weight, mlp.down_proj.weight, shared_logits[0])
        y: Tensor = moe.switch_mlp(x, chosen, scores, shared, residual)
        some = _spread(len(x), _EXPERT_ROWS)
        inputs, added, weights, ids = (numbers(t)[some] for t in (x, residual, scores, chosen))
        beside = None
        if moe.has_shared_expert:
            beside = (matrix(mlp.gate_up_proj.weight), matrix(mlp.down_proj.weight), numbers(shared_logits[0])[some])

        @functools.cache
        def expert(number: int) -> tuple[Tensor, Tensor]:
            return matrix(moe.switch_mlp.gate_up.matrix(number)), matrix(moe.switch_mlp.down.matrix(number))

        self.judge(
            place, "experts", y[some.to(self.device)],
            lambda a: a.experts(inputs, ids.long(), weights, expert, beside, added),
        )  # fmt: skip
        return y

    def _routing(self, place: str, moe: SparseMoE, logits: Tensor, chosen: Tensor, scores: Tensor) -> None:
        likely = logits.softmax(-1)
        bounded = chosen.clamp(0, logits.shape[1] - 1)
        picked = likely.gather(1, bounded)
        worst_of_best = likely.topk(moe.top_k, -1).values[:, -1:]
        distinct = all(len(set(row)) == moe.top_k for row in chosen.tolist())
        if not (distinct and bool((bounded == chosen).all()) and bool((picked >= worst_of_best * (1 - 1e-5)).all())):
            self.faults.append(Fault(place, "experts", len(chosen), torch.inf))
        wanted = picked / picked.sum(-1, keepdim=True) if moe.normalize else picked
        self.judge(place, "experts", scores, lambda a: a.round(wanted), unit=_FP32)

    def _linear(
        self, place: str, linear: Linear | MergedLinear, x: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The product of all rows; that of few of them is judged as well."""
        some = _spread(linear.weight.shape[0])
        dense, bias = matrix(linear.weight, some), _picked(linear.bias, some)
        parts: tuple[Tensor, ...] = ()
        for rows in sorted({min(_FEW, len(x)), len(x)}):
            added = None if residual is None else residual[:rows]
            parts = tuple(linear(x[:rows])) if isinstance(linear, MergedLinear) else (linear(x[:rows], added),)
            y = torch.cat(parts, -1)[:, some.to(self.device)]
            wide, plus = numbers(x[:rows]), None if added is None else numbers(added)[:, some]
            self.judge(place, "linear", y, lambda a, wide=wide, plus=plus: a.product(wide, dense, bias, plus))  # type: ignore[misc]
        return parts

    def _norm(self, place: str, norm: RMSNorm, x: Tensor) -> Tensor:
        y: Tensor = norm(x)
        self.judge(place, "norm", y, lambda a: a.norm(numbers(x), numbers(norm.weight), norm.eps))
        return y

    def _context(self, first: int, last: int) -> Context:
        positions, slots = ragged([0], [last - first], [first], self.device)
        return Context(positions, slots, *self.model.model.rope(positions))


def paged_cache(model: CausalLM) -> Cache:
    """A cache in pages, as chats share one, of a few hundred positions."""
    positions = min(PAGED, model.config.max_position_embeddings)
    return model.make_cache(1, positions, pool_positions=positions + page_size(model.device), paged=True)


def _excess(error: Tensor, noise: Tensor, least: float) -> float:
    """Errors (N, n) as a multiple of what noise (N, m) explains, in the worst row; inf where one is no number."""
    if not bool(error.isfinite().all()):
        return torch.inf
    typical = _rms(error) / (_MARGIN * _rms(noise) + least)
    largest = error.abs().amax(-1) / (_LARGEST_MARGIN * noise.abs().amax(-1) + least)
    return float(torch.maximum(typical, largest).max())


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def _improbability(tokens: Tensor, wanted: Tensor) -> float:
    """χ² of tokens against their distribution, as a multiple of what chance explains; inf for one that cannot be."""
    if bool(((tokens < 0) | (wanted[tokens.clamp(min=0)] == 0)).any()):
        return torch.inf
    expected, counts = wanted * len(tokens), torch.bincount(tokens, minlength=len(wanted)).double()
    common = expected >= 5
    expected, counts = (torch.cat((x[common], x[~common].sum()[None])) for x in (expected, counts))
    squares = (counts - expected).square() / expected.clamp(min=1e-9)
    freedom = int(common.sum())
    return float(squares.sum()) / (freedom + _SIGMAS * math.sqrt(2 * freedom))


def _spread(size: int, wanted: int = _OUTPUTS) -> Tensor:
    """So many numbers below `size`, the first and the last among them."""
    return torch.linspace(0, size - 1, min(size, wanted)).round().long()


def _picked(bias: Tensor | None, some: Tensor) -> Tensor | None:
    return None if bias is None else numbers(bias)[some]


def _twice_rounded(x: Tensor) -> Formula:
    return lambda a: a.round(a.round(x))


def _remembering(ba: Tensor, net: GatedDeltaNet) -> Tensor:
    """The same [b | a] by key head, but with an `a` for which decays lie between 0.9 and 0.999."""
    b, a = ba.unflatten(-1, (net.k_heads, -1)).chunk(2, -1)  # (N, Hk, Hv / Hk) each
    gamma = torch.linspace(0.9, 0.999, a.numel(), dtype=torch.float64, device=a.device).view(-1, net.v_heads)
    step = -gamma.log() / net.A_log.double().exp()
    wanted = step + (-(-step).expm1()).log() - net.dt_bias  # the inverse of softplus
    return torch.cat((b, wanted.view(a.shape).to(a.dtype)), -1).flatten(-2)
