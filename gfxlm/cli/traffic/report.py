"""What a run means: throughput, percentiles, errors, as a table and as JSON with the names of vLLM's benchmark."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gfxlm.cli.traffic.plan import Load
from gfxlm.cli.traffic.sample import Sample

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Report:
    """The samples of one run of `load` over one model of a server."""

    address: str
    model: str
    endpoint: str
    load: Load
    samples: Sequence[Sample]

    @property
    def answered(self) -> list[Sample]:
        """Those that came to their end."""
        return [sample for sample in self.samples if sample.error is None]

    @property
    def duration(self) -> float:
        """Seconds from the first arrival to the last answer."""
        return max((sample.end for sample in self.answered), default=0.0)

    @property
    def errors(self) -> Counter[str]:
        """How often each kind of error occurred."""
        return Counter(sample.error for sample in self.samples if sample.error is not None)

    @property
    def input_tokens(self) -> int:
        """Prompt tokens, as the server counted them."""
        return sum(sample.input_tokens for sample in self.answered)

    @property
    def output_tokens(self) -> int:
        """Generated tokens, as the server counted them, or else the pieces of text that came."""
        return sum(sample.output_tokens for sample in self.answered)

    def per_second(self, amount: float) -> float:
        """An amount over the duration."""
        return amount / self.duration if self.duration else 0.0

    def times(self) -> dict[str, list[float]]:
        """Seconds by name: ttft (arrival to first piece), itl (between pieces), tpot (a request's mean), e2el (all)."""
        samples = self.answered
        return {
            "ttft": [sample.pieces[0] - sample.arrival for sample in samples],
            "itl": [later - earlier for sample in samples for earlier, later in pairwise(sample.pieces)],
            "tpot": [
                (sample.pieces[-1] - sample.pieces[0]) / (sample.output_tokens - 1)
                for sample in samples
                if sample.output_tokens > 1
            ],
            "e2el": [sample.end - sample.arrival for sample in samples],
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, times in milliseconds, and a line for each request; nothing that JSON cannot hold."""
        load = self.load
        summary: dict[str, Any] = {
            "base_url": self.address,
            "model_id": self.model,
            "endpoint": self.endpoint,
            "num_prompts": load.requests,
            "request_rate": "inf" if load.rate == math.inf else load.rate,
            "max_concurrency": load.concurrency,
            "input_len": load.input_tokens,
            "output_len": load.output_tokens,
            "shared_prefix_len": load.shared_prefix,
            "seed": load.seed,
            "duration": self.duration,
            "completed": len(self.answered),
            "failed": len(self.samples) - len(self.answered),
            "errors": dict(self.errors),
            "total_input_tokens": self.input_tokens,
            "total_cached_tokens": sum(sample.cached_tokens for sample in self.answered),
            "total_output_tokens": self.output_tokens,
            "request_throughput": self.per_second(len(self.answered)),
            "output_throughput": self.per_second(self.output_tokens),
            "total_token_throughput": self.per_second(self.input_tokens + self.output_tokens),
        }
        for name, seconds in self.times().items():
            summary |= {f"{key}_{name}_ms": 1e3 * value for key, value in statistics(seconds).items()}
        return summary | {"requests": [_request(sample) for sample in self.samples]}


def statistics(values: Iterable[float]) -> dict[str, float]:
    """Mean, percentiles and maximum; nothing where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    quantiles = {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    return {"mean": math.fsum(ordered) / len(ordered), **quantiles, "max": ordered[-1]}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, linearly, as NumPy does by default."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def table(report: Report) -> str:
    """What a person wants to know of a run."""
    load, done = report.load, len(report.answered)
    cached = sum(sample.cached_tokens for sample in report.answered)
    lines = [
        f"{report.model} at {report.address}, {report.endpoint}: "
        f"{load.input_tokens} tokens in, {load.output_tokens} out, {_arrivals(load)}",
        "",
        f"requests   {done} of {load.requests} answered in {report.duration:.2f} s, {report.per_second(done):.2f}/s",
        f"output     {report.output_tokens} tokens, {report.per_second(report.output_tokens):.1f} tok/s"
        + _short(report, done * load.output_tokens),
        f"in all     {report.input_tokens + report.output_tokens} tokens, "
        f"{report.per_second(report.input_tokens + report.output_tokens):.1f} tok/s"
        + (f", {cached} of them cached" if cached else ""),
    ]
    lines += [f"failed     {count} x {kind}{_example(report, kind)}" for kind, count in report.errors.most_common()]
    return "\n".join([*lines, "", *_latencies(report)]) if done else "\n".join(lines)


def _arrivals(load: Load) -> str:
    if load.rate == math.inf:
        return "all at once" if load.concurrency is None else f"{load.concurrency} at a time"
    return f"{load.rate:g}/s" + ("" if load.concurrency is None else f", at most {load.concurrency} at a time")


def _short(report: Report, asked: int) -> str:
    return "" if report.output_tokens == asked else f" ({asked} were asked for)"


def _example(report: Report, kind: str) -> str:
    message = next(sample.message for sample in report.samples if sample.error == kind)
    return f": {message}" if message else ""


def _latencies(report: Report) -> list[str]:
    names = {
        "ttft": "first token, ms",
        "itl": "between pieces, ms",
        "tpot": "per output token, ms",
        "e2el": "whole answer, ms",
    }
    columns = ["mean", *(f"p{percent}" for percent in PERCENTILES), "max"]
    lines = [
        f"| {'':<20} | " + " | ".join(f"{column:>9}" for column in columns) + " |",
        f"| {'-' * 20} | " + " | ".join("-" * 8 + ":" for _ in columns) + " |",
    ]
    for name, seconds in report.times().items():
        values = statistics(seconds)
        cells = (f"{1e3 * values[column]:9.2f}" if values else " " * 9 for column in columns)
        lines.append(f"| {names[name]:<20} | " + " | ".join(cells) + " |")
    return lines


def _request(sample: Sample) -> dict[str, Any]:
    answered = sample.error is None
    return {
        "arrival_s": sample.arrival,
        "ttft_ms": 1e3 * (sample.pieces[0] - sample.arrival) if sample.pieces else None,
        "e2el_ms": 1e3 * (sample.end - sample.arrival),
        "input_tokens": sample.input_tokens if answered else None,
        "output_tokens": sample.output_tokens if answered else None,
        "error": sample.error,
        "message": sample.message or None,
    }
