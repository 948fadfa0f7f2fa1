"""`gfxlm info`: what a model is, and what it takes to run it."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gfxlm.cli.text import counted

if TYPE_CHECKING:
    from gfxlm.engine.budget import Budget
    from gfxlm.engine.info import ModelInfo

_SHORT_CONTEXT = 4096


def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model folder or a hub name. Default: the built-in model."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Whose memory it is to fit into. Default: a GPU if there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Describe a model, and say whether it fits into memory. Reads no weights."""
    from gfxlm.device.select import pick_device
    from gfxlm.engine.budget import planned
    from gfxlm.engine.info import describe
    from gfxlm.engine.load import BUILT_IN, open_checkpoint
    from gfxlm.models.load import build

    place, checkpoint = pick_device(device), open_checkpoint(model or BUILT_IN, revision)
    found = describe(checkpoint, device=place)
    budget = planned(build(checkpoint)[0], checkpoint, place)
    print(json.dumps(_json(found, budget)) if as_json else _text(found, budget))


def _position_bytes(found: "ModelInfo", budget: "Budget") -> dict[int, int]:
    """What a position's keys and values take by their bits, as they are first; none without attention layers."""
    as_they_are = {8 * layer.dtype.itemsize: budget.position for layer in found.attention}
    return as_they_are | dict(budget.quantized) if as_they_are else {}


def _contexts(found: "ModelInfo") -> list[int]:
    return sorted({min(_SHORT_CONTEXT, found.context_length), found.context_length})


def _json(found: "ModelInfo", budget: "Budget") -> dict[str, object]:
    fields = {name: value for name, value in asdict(found).items() if name not in ("attention", "kv_format")}
    kv = {
        str(bits): {"bytes_per_token": nbytes, "bytes": nbytes * found.context_length}
        for bits, nbytes in _position_bytes(found, budget).items()
    }
    return fields | {
        "bits_per_weight": found.bits_per_weight,
        "bytes_per_token": found.bytes_per_token,
        "kv_bytes_per_token": budget.position,
        "kv_bits": kv,
        "available_bytes": budget.memory,
        "fits": {str(context): context <= budget.longest for context in _contexts(found)},
        "longest_context": budget.longest,
    }


def _text(found: "ModelInfo", budget: "Budget") -> str:
    attention = found.layers - found.recurrent_layers
    mixed = f" ({found.recurrent_layers} gated delta net, {attention} attention)" if found.recurrent_layers else ""
    rows = [
        ("architecture", found.model_type),
        ("layers", f"{found.layers}{mixed}"),
        ("parameters", f"{counted(found.parameters)}, active per token {counted(found.active_parameters)}"),
        ("quantisation", found.quantization),
        ("bits per weight", f"{found.bits_per_weight:.3f}"),
        ("size on disk", _size(found.disk_bytes)),
        ("bytes per token", f"{_size(found.bytes_per_token)} at batch 1, {_size(2 * found.state_bytes)} of it state"),
        *_kv_rows(found, budget),
        ("state per sequence", _size(found.state_bytes)),
        ("context length", f"{found.context_length} tokens"),
    ]
    for context in _contexts(found):
        verdict = "yes" if context <= budget.longest else "no"
        need = _size(budget.needed(context))
        rows.append((f"fits at {context}", f"{verdict}: needs {need}, {_size(budget.memory)} are free"))
    if 0 < budget.longest < found.context_length:
        rows.append(("longest context", f"{budget.longest} tokens fit"))
    return "\n".join(f"{label:<20}{value}" for label, value in rows)


def _kv_rows(found: "ModelInfo", budget: "Budget") -> list[tuple[str, str]]:
    by_bits = _position_bytes(found, budget)
    if not by_bits:
        return [("KV cache per token", "none")]
    rows = []
    for label, positions in (("KV cache per token", 1), (f"KV cache at {found.context_length}", found.context_length)):
        sizes = (f"{_size(nbytes * positions)} with {bits} bits" for bits, nbytes in by_bits.items())
        rows.append((label, ", ".join(sizes)))
    return rows


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes" if nbytes else "none"
