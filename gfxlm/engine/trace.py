"""Where the time of one decode step and one prompt chunk goes: what ran for each kind of layer, and a Chrome trace."""

import gzip
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gfxlm.device.ceilings import synchronize
from gfxlm.engine.bench import Workload
from gfxlm.engine.sampler import Sampler
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM, DecoderLayer
from gfxlm.nn.attention import Attention
from gfxlm.nn.cache import Cache
from gfxlm.nn.mlp import SparseMoE
from gfxlm.ops.ragged import ragged

REST, ALL = "embedding, head, sampling", "all"
_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_GPU_CALLS = ("cuda_runtime", "cuda_driver")
_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Share:
    """What one kind of layer, or REST, or ALL, takes of a step of so many tokens: sums over all `layers` of the kind.

    On a GPU a launch is of a kernel, a copy or a fill, ours and torch's alike, and its time the GPU's. On a CPU it is
    an operator of torch's that no other one called.
    """

    step: str  # named as a test is: pp512, tg1 @ d4096
    tokens: int
    kind: str
    layers: int
    name: str  # of the kernel or operator, ALL for them together
    launches: int
    microseconds: float


def layer_kind(layer: DecoderLayer) -> str:
    """What a layer is made of: attention + MLP, attention + MoE, gated delta net + MoE, ..."""
    mixer = "attention" if isinstance(layer.mixer, Attention) else "gated delta net"
    return f"{mixer} + {'MoE' if isinstance(layer.mlp, SparseMoE) else 'MLP'}"


@torch.inference_mode()
def trace(model: CausalLM, path: Path, *, prompt: int = 0, depth: int = 0, sequences: int = 1) -> list[Share]:
    """Run a decode step, and a chunk of `prompt` tokens where that is not 0, after `depth` tokens; write the trace.

    The steps run kernel by kernel, as they do before they are recorded: a graph runs the same ones without the gaps.
    Raises UserError where the file cannot be written.
    """
    try:
        path.touch()
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror}") from error
    cache = model.make_cache(sequences, depth + max(prompt, 1))
    for start in range(0, depth, _CHUNK):
        _step(model, cache, start, min(_CHUNK, depth - start))()
    counts = {Workload(prompt, 0, depth).name: prompt} if prompt else {}
    counts[Workload(0, 1, depth).name] = 1
    steps = {name: _step(model, cache, depth, count) for name, count in counts.items()}
    tokens = {name: sequences * count for name, count in counts.items()}
    with _named_layers(model) as kinds:
        for step in (*steps.values(), *steps.values()):  # compiles
            step()
        synchronize(model.device)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (model.device.type == "cuda")
        with profile(activities=activities, acc_events=True) as profiler:  # else it warns that it will forget them
            for name, step in steps.items():
                with record_function(name):
                    step()
                synchronize(model.device)
    profiler.export_chrome_trace(str(path))
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        events = json.load(file)["traceEvents"]
    return shares(events, tokens, kinds)


def _step(model: CausalLM, cache: Cache, start: int, count: int) -> Callable[[], None]:
    """What feeds every slot `count` tokens after `start`, and chooses the next one; its inputs are on the device."""
    sequences, vocab_size = len(cache.lengths), model.config.vocab_size
    positions, slots = ragged(range(sequences), [count] * sequences, [start] * sequences, model.device)
    tokens = torch.randint(vocab_size, positions.shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    sampler = Sampler(sequences, vocab_size, model.device)
    last = slice(count - 1, None, count)

    def step() -> None:
        hidden = model.forward(tokens, positions, slots, cache)
        sampler.sample(model.logits(hidden[last]), slots.index[last], positions[last])

    return step


@contextmanager
def _named_layers(model: CausalLM) -> Iterator[dict[str, str]]:
    """While this is open, each layer is a range of the profiler's; it yields their names, and what kind each is."""
    kinds, hooks = {}, []
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        name = f"layer {number}"
        kinds[name] = layer_kind(layer)
        around = _Range(name)
        hooks += [layer.register_forward_pre_hook(around.begin), layer.register_forward_hook(around.end)]
    try:
        yield kinds
    finally:
        for hook in hooks:
            hook.remove()


class _Range:
    """A range of the profiler's that hooks begin and end."""

    def __init__(self, name: str) -> None:
        self._name = name

    def begin(self, *_: object) -> None:
        self._open = record_function(self._name)
        self._open.__enter__()

    def end(self, *_: object) -> None:
        self._open.__exit__(None, None, None)


Event = dict[str, Any]  # of Chrome's trace format; ts and dur are in µs


class _Ranges:
    """Ranges that do not overlap, to be looked up by a time in them."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._events = sorted(events, key=lambda event: float(event["ts"]))
        self._starts = [event["ts"] for event in self._events]

    def at(self, time: float) -> str | None:
        """The name of the range around that time."""
        place = bisect_right(self._starts, time) - 1
        if place < 0 or time > self._starts[place] + self._events[place]["dur"]:
            return None
        return str(self._events[place]["name"])


def shares(events: Sequence[Event], steps: Mapping[str, int], kinds: Mapping[str, str]) -> list[Share]:
    """Count a trace's events by the ranges that they were asked for in: steps by name with their tokens, and layers."""
    named = [event for event in events if event.get("cat") == "user_annotation"]
    of_steps = _Ranges(event for event in named if event["name"] in steps)
    of_layers = _Ranges(event for event in named if event["name"] in kinds)
    launches: Counter[tuple[str, str, str]] = Counter()
    times: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    on_gpu = any(event.get("cat") in _GPU_WORK for event in events)
    for began, event in _launched(events) if on_gpu else _outermost(events):
        if (step := of_steps.at(began)) is None:
            continue  # between two steps
        kind = kinds.get(of_layers.at(began) or "", REST)
        for key in ((step, kind, _short(event["name"])), (step, kind, ALL), (step, ALL, ALL)):
            launches[key] += 1
            times[key] += event["dur"]
    layers = Counter(kinds.values())
    places = {name: place for place, name in enumerate([*steps, *layers, REST, ALL])}

    def place(share: Share) -> tuple[object, ...]:
        return places[share.step], places[share.kind], share.name != ALL, -share.microseconds, share.name

    return sorted(
        (
            Share(
                step, steps[step], kind, layers.get(kind, 1), name, launches[step, kind, name], times[step, kind, name]
            )
            for step, kind, name in launches
        ),
        key=place,
    )


def _launched(events: Sequence[Event]) -> Iterator[tuple[float, Event]]:
    """All that the GPU did, and when the host asked for it."""
    asked = {}
    for event in events:
        if event.get("cat") in _GPU_CALLS and "correlation" in event.get("args", {}):
            asked[event["args"]["correlation"]] = event["ts"]
    for event in events:
        if event.get("cat") in _GPU_WORK:
            yield asked[event["args"]["correlation"]], event


def _outermost(events: Sequence[Event]) -> Iterator[tuple[float, Event]]:
    """The operators that are not part of others, and when they began."""
    end = float("-inf")
    operators = (event for event in events if event.get("cat") == "cpu_op")
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= end:
            end = event["ts"] + event["dur"]
            yield event["ts"], event


def _short(name: str) -> str:
    """A kernel's name without C++'s types."""
    return name.removeprefix("void ").split("<")[0].split("(")[0].strip()
