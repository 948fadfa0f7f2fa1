"""What batching gains a server: its worker under load, without HTTP, for one client and for many.

    python -m benchmarks.serve_engine [--synthetic qwen3-8b] [--clients 1,32] [--input-tokens 512] [--output-tokens 128]

Each client sends its next request when it has its answer. Detokenising, stop strings and the way from the engine's
thread to the event loop are in the numbers; parsing, JSON and sockets are not (`gfxlm bench serve` has them).
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

from gfxlm import SamplingParams
from gfxlm.cli.traffic.plan import Endpoint, Load, plan
from gfxlm.cli.traffic.report import Report, statistics, table
from gfxlm.cli.traffic.sample import Sample
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.synthetic import load_synthetic
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.models.base import CausalLM
from gfxlm.server.worker import Worker

# Never written, so that every text is searched for it to its end.
STOP = ("\n\nno text holds this\n\n",)


def make_worker(args: argparse.Namespace, most: int) -> Worker:
    def load_model() -> tuple[CausalLM, Tokenizer]:
        if args.synthetic is None:
            return load(args.model, device=args.device)
        return load_synthetic(args.synthetic, device=args.device)

    def make_engine(model: CausalLM, tokenizer: Tokenizer) -> Engine:
        return Engine(
            model,
            max_batch=most,
            max_context=args.input_tokens + args.output_tokens,
            prefill_step_size=args.prefill_step_size,
            batch_invariant=args.batch_invariant,
        )

    return Worker(args.synthetic or args.model, load_model, make_engine, capacity=most)


async def answer(worker: Worker, prompt: list[int], most: int, sample: Sample, start: float) -> None:
    sample.arrival = time.monotonic() - start
    params = SamplingParams(max_tokens=most, temperature=0, stop=STOP)
    generation = worker.generate(prompt, params)
    async for _ in generation:
        sample.pieces.append(time.monotonic() - start)
    sample.end = time.monotonic() - start
    sample.input_tokens, sample.output_tokens = len(prompt), generation.generated_tokens
    sample.cached_tokens = generation.cached_tokens


async def measure(worker: Worker, workload: Load) -> Report:
    prompts = [list(planned.body["prompt"]) for planned in plan(workload, worker.name, Endpoint.COMPLETIONS)]
    samples = [Sample(0.0) for _ in prompts]
    slots = asyncio.Semaphore(workload.concurrency or len(prompts))
    start = time.monotonic()

    async def client(number: int) -> None:
        async with slots:
            await answer(worker, prompts[number], workload.output_tokens, samples[number], start)

    await asyncio.gather(*map(client, range(len(prompts))))
    return Report("this process", worker.name, "worker", workload, samples)


async def run(args: argparse.Namespace) -> list[Report]:
    counts = [int(count) for count in args.clients.split(",")]
    worker = make_worker(args, max(counts))
    begin = time.monotonic()
    worker.start()
    await worker.ready()
    print(f"loaded and warmed up in {time.monotonic() - begin:.1f} s\n")
    reports = []
    for clients in counts:
        sizes = {"input_tokens": args.input_tokens, "output_tokens": args.output_tokens, "concurrency": clients}
        # Other prompts each time: a cache of prefixes shall find nothing.
        await measure(worker, Load(requests=clients, seed=2 * clients, **sizes))
        reports.append(await measure(worker, Load(requests=args.rounds * clients, seed=2 * clients + 1, **sizes)))
        print(table(reports[-1]), end="\n\n", flush=True)
    await worker.close()
    return reports


def summary(reports: list[Report]) -> str:
    alone = reports[0].per_second(reports[0].output_tokens)
    lines = [
        "| clients | output tok/s | gain | TTFT p50 | TTFT p95 | between tokens p50 | p95, ms |",
        "|---:" * 7 + "|",
    ]
    for report in reports:
        speed, times = report.per_second(report.output_tokens), report.times()
        first, between = statistics(times["ttft"]), statistics(times["itl"])
        lines.append(
            f"| {report.load.concurrency} | {speed:.1f} | {speed / alone:.2f} | {1e3 * first['p50']:.1f} | "
            f"{1e3 * first['p95']:.1f} | {1e3 * between['p50']:.2f} | {1e3 * between['p95']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", metavar="NAME")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--device")
    parser.add_argument("--clients", default="1,32")
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client")
    parser.add_argument("--input-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--prefill-step-size", type=int, default=2048)
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    reports = asyncio.run(run(args))
    print(summary(reports))
    if args.json:
        args.json.write_text(json.dumps([report.as_json() for report in reports], indent=2))


if __name__ == "__main__":
    main()
