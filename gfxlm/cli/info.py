"""`gfxlm info`: what a model is, and what it takes to run it."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gfxlm.cli.text import counted
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.engine.info import ModelInfo

_SHORT_CONTEXT = 4096
_KV_BITS = (8, 4)
_KV_GROUP_SIZES = (64, 32)


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
    from gfxlm.device.memory import available_bytes
    from gfxlm.device.select import pick_device
    from gfxlm.engine.info import describe
    from gfxlm.engine.load import BUILT_IN, open_checkpoint

    place = pick_device(device)
    found = describe(open_checkpoint(model or BUILT_IN, revision), device=place)
    memory = available_bytes(place)
    print(json.dumps(_json(found, memory)) if as_json else _text(found, memory))


def _by_kv_bits(found: "ModelInfo") -> "dict[int, ModelInfo]":
    """The model with caches as they are and with quantised ones, by their bits; without those that cannot be."""
    from gfxlm.nn.cache import KVFormat

    by_bits = {8 * layer.dtype.itemsize: found for layer in found.attention}
    for bits in _KV_BITS if found.attention else ():
        for group_size in _KV_GROUP_SIZES:
            try:
                by_bits[bits] = found.with_kv(KVFormat(bits, group_size))
                break
            except UserError:  # heads of other sizes
                continue
    return by_bits


def _contexts(found: "ModelInfo") -> list[int]:
    return sorted({min(_SHORT_CONTEXT, found.context_length), found.context_length})


def _json(found: "ModelInfo", memory: int) -> dict[str, object]:
    fields = {name: value for name, value in asdict(found).items() if name not in ("attention", "kv_format")}
    kv = {
        str(bits): {"bytes_per_token": kv.kv_bytes_per_token, "bytes": kv.kv_bytes_per_token * found.context_length}
        for bits, kv in _by_kv_bits(found).items()
    }
    return fields | {
        "bits_per_weight": found.bits_per_weight,
        "bytes_per_token": found.bytes_per_token,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "kv_bits": kv,
        "available_bytes": memory,
        "fits": {str(context): found.needed_bytes(context) <= memory for context in _contexts(found)},
        "longest_context": found.longest_context(memory),
    }


def _text(found: "ModelInfo", memory: int) -> str:
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
        *_kv_rows(found),
        ("state per sequence", _size(found.state_bytes)),
        ("context length", f"{found.context_length} tokens"),
    ]
    for context in _contexts(found):
        need = found.needed_bytes(context)
        verdict = "yes" if need <= memory else "no"
        rows.append((f"fits at {context}", f"{verdict}: needs {_size(need)}, {_size(memory)} are free"))
    if 0 < (longest := found.longest_context(memory)) < found.context_length:
        rows.append(("longest context", f"{longest} tokens fit"))
    return "\n".join(f"{label:<20}{value}" for label, value in rows)


def _kv_rows(found: "ModelInfo") -> list[tuple[str, str]]:
    by_bits = _by_kv_bits(found)
    if not by_bits:
        return [("KV cache per token", "none")]
    rows = []
    for label, positions in (("KV cache per token", 1), (f"KV cache at {found.context_length}", found.context_length)):
        sizes = (f"{_size(kv.kv_bytes_per_token * positions)} with {bits} bits" for bits, kv in by_bits.items())
        rows.append((label, ", ".join(sizes)))
    return rows


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes" if nbytes else "none"
