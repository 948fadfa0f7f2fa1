"""How the server's models are opened: the weights, and an engine over them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfxlm.models.cache import KVOptions
from gfxlm.server.registry import ModelSpec
from gfxlm.server.residency import Residency

if TYPE_CHECKING:
    import torch

    from gfxlm.engine.engine import Engine
    from gfxlm.engine.tokenizer import Tokenizer
    from gfxlm.models.base import CausalLM

_LONG_TEXT = 8192  # tokens


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What all models of a server have in common. `load` holds arguments of `gfxlm.load`."""

    load: Mapping[str, Any] = field(default_factory=dict)
    kv: KVOptions = field(default_factory=KVOptions)
    max_context: int | None = None
    max_concurrency: int = 32
    prefill_step_size: int = 2048
    prefix_cache: bool = True
    batch_invariant: bool = False

    def specs(
        self, paths: Sequence[str], names: Sequence[str] = (), residency: Residency | None = None
    ) -> list[ModelSpec]:
        """A model for each path, under its name, by default the path itself; a `residency` says who takes how much."""
        named = [*names, *paths[len(names) :]]
        return [self._spec(path, name, residency) for path, name in zip(paths, named, strict=True)]

    def residency(self, paths: Sequence[str]) -> Residency | None:
        """How all of these models share the memory that there is, None where it does not do for all of them."""
        from gfxlm.device.memory import available_bytes, parsed_bytes, taken_bytes
        from gfxlm.device.select import pick_device

        if len(paths) < 2:
            return None
        device = pick_device(self.load.get("device"))
        given = self.load.get("memory_limit")
        free = available_bytes(device, None if given is None else parsed_bytes(given, device))
        residency = Residency(free, taken_bytes(device), {path: self._need(path, device) for path in paths})
        return residency if residency.fits else None

    def _need(self, path: str, device: "torch.device") -> int:
        """Bytes of a model that has room for a long text and a short one in each other slot."""
        from gfxlm.engine.budget import LEAST_CONTEXT, planned
        from gfxlm.engine.load import open_checkpoint
        from gfxlm.models.load import build

        checkpoint = open_checkpoint(path, self.load.get("revision"))
        model, _ = build(checkpoint, None)
        context = self.max_context or model.config.max_position_embeddings
        model = self.kv.model_for(model, context)
        budget = planned(
            model,
            checkpoint,
            device,
            dtype=self.load.get("dtype"),
            kv=model.kv_format,
            slots=self.max_concurrency,
            prefill_step_size=self.prefill_step_size,
        )
        return budget.needed(min(context, _LONG_TEXT) + self.max_concurrency * LEAST_CONTEXT)

    def synthetic(self, name: str) -> ModelSpec:
        """A model of random weights in the shapes of a published one, or of a folder's config.json."""
        given = {
            argument: self.load[argument] for argument in ("dtype", "device", "memory_limit") if argument in self.load
        }

        def load() -> "tuple[CausalLM, Tokenizer]":
            from gfxlm.engine.synthetic import load_synthetic

            return load_synthetic(name, **given)

        return ModelSpec(name=name, load=load, make_engine=self.make_engine)

    def _spec(self, path: str, name: str, residency: Residency | None) -> ModelSpec:
        aliases = {path, Path(path).name, str(Path(path).absolute())}
        return ModelSpec(
            name=name,
            aliases=frozenset(aliases),
            load=lambda: self.open(path, residency),
            make_engine=self.make_engine,
        )

    def open(self, path: str, residency: Residency | None = None) -> "tuple[CausalLM, Tokenizer]":
        """Load a model and its tokenizer. Raises UserError where it cannot be loaded."""
        from gfxlm.engine.load import load

        given = dict(self.load)
        if residency is not None:
            given["memory_limit"] = residency.limit(path)
        model, tokenizer = load(path, max_context=self.max_context, kv=self.kv, **given)
        if residency is not None:
            residency.opened(path, model)
        return model, tokenizer

    def make_engine(self, model: "CausalLM", tokenizer: "Tokenizer") -> "Engine":
        """An engine for so many requests at once."""
        from gfxlm.engine.engine import Engine
        from gfxlm.engine.grammar import Grammars

        context = self.max_context or model.config.max_position_embeddings
        return Engine(
            self.kv.model_for(model, context),
            eos_token_ids=tokenizer.eos_token_ids,
            max_batch=self.max_concurrency,
            max_context=self.max_context,
            prefill_step_size=self.prefill_step_size,
            grammars=Grammars(tokenizer, model.config.vocab_size),
            prefix_cache=self.prefix_cache,
            batch_invariant=self.batch_invariant,
        )
