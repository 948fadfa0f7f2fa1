"""`gfxlm bench`: llama-bench's table."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gfxlm.cli.options import MODEL_PANEL, ModelOptions, grouped
from gfxlm.cli.progress import progress_bar
from gfxlm.cli.text import counted, note
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.engine.bench import Result
    from gfxlm.engine.info import ModelInfo
    from gfxlm.models.base import CausalLM
    from gfxlm.weights.checkpoint import Checkpoint

_WIDTHS = {"model": 20, "size": 10, "params": 10, "test": 16, "t/s": 20, "peak": 16}


class Output(StrEnum):
    """How the results are printed."""

    MD = "md"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


@dataclass(frozen=True, kw_only=True)
class BenchModelOptions(ModelOptions):
    """The options of every command, with llama-bench's short one."""

    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A model folder or a hub name. Default: the built-in model.", **MODEL_PANEL),
    ] = None


@grouped
def bench(
    context: typer.Context,
    model: BenchModelOptions,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random 4-bit weights in the shapes of qwen3-8b, qwen3-30b-a3b, qwen3-coder-next, or a config.json.",
        ),
    ] = None,
    prompt: Annotated[str, typer.Option("--n-prompt", "-p", help="Prompt lengths; 0 for none.")] = "512",
    generated: Annotated[str, typer.Option("--n-gen", "-n", help="Numbers of tokens to generate; 0 for none.")] = "128",
    both: Annotated[
        list[str] | None, typer.Option("-pg", metavar="PP,TG", help="A prompt and then generation; may be given again.")
    ] = None,
    depth: Annotated[str, typer.Option("--n-depth", "-d", help="Tokens in the cache before a test begins.")] = "0",
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Times to run each test.")] = 5,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Sequences at a time.")] = 1,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print the results.")] = Output.MD,
    no_warmup: Annotated[
        bool, typer.Option("--no-warmup", help="Count a test's first run, which compiles and records.")
    ] = False,
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Prompt tokens to process at a time.")] = 2048,
    kv_bits: Annotated[
        int | None, typer.Option(help="Quantise keys and values to 8 or 4 bits. Default: not at all.")
    ] = None,
    kv_group_size: Annotated[int, typer.Option(help="How many of them share a scale: 32, 64 or 128.")] = 64,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Instead of tests, run a chunk of the first -p and one decode step under torch's profiler: print what "
            "each kind of layer takes, and write a trace for chrome://tracing or ui.perfetto.dev.",
        ),
    ] = None,
) -> None:
    """Measure speed on synthetic tokens: prompts (pp), generation (tg), in tokens a second.

    -p, -n and -d take lists: -p 512,2048. GB/s is what generation must read and write, TFLOP/s what a prompt's matrix
    products compute; % bw and % mm are their shares of what this machine can do, measured in the same run. peak is what
    was allocated on a GPU, and by how much that exceeds weights and caches. The speed of each length's first prompt,
    before any repetition, is told below the table, and is first_ts in the other forms.
    """
    if context.invoked_subcommand is not None:
        _check_no_options(context)
        return
    shapes = [(p, 0) for p in _numbers("-p", prompt) if p] + [(0, n) for n in _numbers("-n", generated) if n]
    shapes += [_pair(text) for text in both or ()]
    depths = _numbers("-d", depth)

    from gfxlm.device.ceilings import backend_name, matmul_rate, read_bandwidth
    from gfxlm.engine.bench import Bench, Workload
    from gfxlm.engine.info import describe
    from gfxlm.nn.cache import KVFormat

    printers = {Output.JSON: _json, Output.JSONL: _json_lines, Output.CSV: _csv}
    kv_format = None if kv_bits is None else KVFormat(kv_bits, kv_group_size)
    if trace is not None and not trace.absolute().parent.is_dir():
        raise UserError(f"{trace}: its folder does not exist")
    lm, checkpoint = _open(model, synthetic)
    if kv_format is not None:
        lm = lm.with_quantized_kv(kv_format.bits, kv_format.group_size)
    runner = Bench(lm, batch_size=batch_size, prefill_step_size=prefill_step_size)
    workloads = [Workload(p, n, d) for d in depths for p, n in shapes]
    for workload in workloads:
        runner.check(workload)
    if trace is not None:
        runner.check(Workload(0, 1, max(depths)))
        chunk = min(prefill_step_size, next((p for p, _ in shapes if p), 0))
        printers.get(output, _trace_table)(_traced(lm, trace, chunk, max(depths), batch_size))
        return
    machine = Machine(backend_name(lm.device), read_bandwidth(lm.device), matmul_rate(lm.device))
    note(
        f"measured on this machine: {machine.read_bandwidth / 1e9:.1f} GB/s of reads, "
        f"{machine.matmul_rate / 1e12:.3f} TFLOP/s in a bfloat16 matrix product"
    )
    info = describe(checkpoint, lm.dtype, lm.device).with_kv(kv_format)

    def measured() -> Iterator[dict[str, Any]]:
        for workload in workloads:
            with progress_bar(workload.name) as progress:
                result = runner.run(workload, repetitions, warm_up=not no_warmup, progress=progress)
            yield _row(checkpoint.folder.name, info, machine, result)

    printers.get(output, _markdown)(measured())


def _check_no_options(context: typer.Context) -> None:
    """UserError for options that stand before a sub-command, which would not hear of them."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(
                f"{parameter.opts[0]}: options of `bench {context.invoked_subcommand}` stand behind its name"
            )


def _open(options: BenchModelOptions, synthetic: str | None) -> "tuple[CausalLM, Checkpoint]":
    """The model to measure, and what describes it."""
    import torch

    from gfxlm.device.select import pick_device
    from gfxlm.engine.load import open_checkpoint
    from gfxlm.models.load import load_model
    from gfxlm.models.synthetic import synthetic_checkpoint

    if synthetic is None:
        return options.load()[0], open_checkpoint(options.path, options.revision)
    if options.model is not None:
        raise UserError("--model and --synthetic: only one model can be measured")
    device = pick_device(options.device)
    checkpoint = synthetic_checkpoint(synthetic, device)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    total, done = sum(tensor.nbytes for tensor in checkpoint.tensors.values()), 0
    with progress_bar("making weights", in_bytes=True) as progress:

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        return load_model(checkpoint, dtype=dtype, device=device, progress=count), checkpoint


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"{option}: expected numbers with commas between, but got {text!r}")
    return [int(part) for part in parts]


def _pair(text: str) -> tuple[int, int]:
    numbers = _numbers("-pg", text)
    if len(numbers) != 2 or 0 in numbers:
        raise UserError(f"-pg: expected two numbers above 0, as in 512,128, but got {text!r}")
    return numbers[0], numbers[1]


@dataclass(frozen=True, slots=True)
class Machine:
    """What the model runs on, and what that can do at best: bytes a second, operations a second."""

    backend: str
    read_bandwidth: float
    matmul_rate: float


def _row(model: str, info: "ModelInfo", machine: Machine, result: "Result") -> dict[str, Any]:
    """One result, by llama-bench's names where it has them."""
    import torch

    bandwidth, compute = result.bandwidth(info), result.compute_rate(info)
    return {
        "model": model,
        "model_type": info.model_type,
        "model_size": info.weight_bytes,
        "model_n_params": info.parameters,
        "backend": machine.backend,
        "n_threads": torch.get_num_threads(),
        "batch_size": result.batch_size,
        "kv_bits": info.kv_format and info.kv_format.bits,
        "kv_group_size": info.kv_format and info.kv_format.group_size,
        "test": result.workload.name,
        "n_prompt": result.workload.prompt,
        "n_gen": result.workload.generated,
        "n_depth": result.workload.depth,
        "avg_ts": result.mean,
        "stddev_ts": result.deviation,
        "samples_ts": list(result.speeds),
        "first_ts": result.first,
        "bytes_per_second": bandwidth,
        "bandwidth_share": bandwidth and bandwidth / machine.read_bandwidth,
        "operations_per_second": compute,
        "matmul_share": compute and compute / machine.matmul_rate,
        "read_bandwidth": machine.read_bandwidth,
        "matmul_rate": machine.matmul_rate,
        "peak_bytes": result.peak_bytes,
        "memory_share": result.memory_share(info),
    }


def _markdown(rows: Iterable[dict[str, Any]]) -> None:
    first = []
    for number, row in enumerate(rows):
        if row["first_ts"] is not None:
            first.append(f"{row['test']} {row['first_ts']:.2f} t/s")
        cells = {
            "model": row["model"],
            "size": _binary_size(row["model_size"]),
            "params": counted(row["model_n_params"]),
            "backend": row["backend"],
            "threads": str(row["n_threads"]),
            "batch": str(row["batch_size"]),
            "kv bits": str(row["kv_bits"]),
            "test": row["test"],
            "t/s": f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
            "GB/s": _scaled(row["bytes_per_second"], 1e-9, 1),
            "% bw": _scaled(row["bandwidth_share"], 100, 1),
            "TFLOP/s": _scaled(row["operations_per_second"], 1e-12, 3),
            "% mm": _scaled(row["matmul_share"], 100, 1),
            "peak": _peak(row["peak_bytes"], row["memory_share"]),
        }
        here = {"batch": row["batch_size"] > 1, "kv bits": row["kv_bits"], "peak": row["peak_bytes"]}
        cells = {name: cell for name, cell in cells.items() if here.get(name, True)}
        widths = {name: max(_WIDTHS.get(name, 8), len(row["model"]) if name == "model" else 0) for name in cells}
        if number == 0:
            print("| " + " | ".join(f"{name:>{widths[name]}}" for name in cells) + " |")
            print("| " + " | ".join("-" * (widths[name] - 1) + ":" for name in cells) + " |")
        print("| " + " | ".join(f"{cell:>{widths[name]}}" for name, cell in cells.items()) + " |", flush=True)
    if first:
        note(f"first prompt: {', '.join(first)}")


def _traced(lm: "CausalLM", path: Path, prompt: int, depth: int, sequences: int) -> list[dict[str, Any]]:
    """What a prompt's chunk and a decode step take, by kind of layer and by what ran there."""
    from gfxlm.engine.trace import ALL, trace

    shares = trace(lm, path, prompt=prompt, depth=depth, sequences=sequences)
    totals = {share.step: share.microseconds for share in shares if share.kind == ALL}
    note(
        "launches are calls of torch's operators, those that they make not counted"
        if lm.device.type == "cpu"
        else "launches are kernels, copies and fills on the GPU, torch's among them; one by one, not as a graph"
    )
    return [
        {
            "step": share.step,
            "n_tokens": share.tokens,
            "layers": share.kind,
            "n_layers": share.layers,
            "name": share.name,
            "launches": share.launches,
            "us": share.microseconds,
            "launches_per_layer": share.launches / share.layers,
            "us_per_layer": share.microseconds / share.layers,
            "share": share.microseconds / totals[share.step],
        }
        for share in shares
    ]


def _trace_table(rows: Iterable[dict[str, Any]]) -> None:
    """One line for each kind of layer, and below it what takes a hundredth of the step or more."""
    table = [["step", "layers", "", "launches", "µs", "launches/layer", "µs/layer", "%"]]
    for row in rows:
        whole = row["name"] == "all"
        if not whole and row["share"] < 0.01:
            continue
        one = row["n_layers"] == 1
        kind = row["layers"] if one else f"{row['n_layers']} x {row['layers']}"
        if row["layers"] == "all" and row["n_tokens"] > 1:
            kind += f", {row['us'] / row['n_tokens']:.2f} µs a token"
        names = [row["step"], kind, ""] if whole else ["", "", row["name"]]
        each = ["", ""] if one else [f"{row['launches_per_layer']:.4g}", f"{row['us_per_layer']:.1f}"]
        table.append([*names, str(row["launches"]), f"{row['us']:.1f}", *each, f"{100 * row['share']:.1f}"])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    table.insert(1, ["-" * width if column < 3 else "-" * (width - 1) + ":" for column, width in enumerate(widths)])
    for line in table:
        aligned = (f"{cell:{'<' if column < 3 else '>'}{widths[column]}}" for column, cell in enumerate(line))
        print("| " + " | ".join(aligned) + " |")


def _binary_size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


def _peak(nbytes: int | None, share: float | None) -> str:
    return "" if nbytes is None or share is None else f"{_binary_size(nbytes)} {100 * (share - 1):+.0f} %"


def _scaled(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{value * factor:.{digits}f}"


def _json(rows: Iterable[dict[str, Any]]) -> None:
    print(json.dumps(list(rows), indent=2))


def _json_lines(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        print(json.dumps(row), flush=True)


def _csv(rows: Iterable[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        row.pop("samples_ts", None)
        writer = csv.DictWriter(sys.stdout, row, lineterminator="\n")
        if number == 0:
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()
