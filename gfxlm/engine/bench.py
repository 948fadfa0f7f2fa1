"""Speeds of a model on synthetic tokens, measured as llama-bench does: no tokenizer, no sampling."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gfxlm.device.ceilings import synchronize
from gfxlm.device.memory import peak_bytes
from gfxlm.engine.engine import Engine
from gfxlm.engine.info import ModelInfo
from gfxlm.engine.logprobs import Draw
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM


@dataclass(frozen=True, slots=True)
class Workload:
    """A prompt of so many tokens, then so many generated ones, after `depth` tokens that are in the cache already."""

    prompt: int
    generated: int
    depth: int = 0

    @property
    def name(self) -> str:
        """llama-bench's: pp512, tg128, pp512+tg128, pp512 @ d4096."""
        parts = [f"pp{self.prompt}"] * (self.prompt > 0) + [f"tg{self.generated}"] * (self.generated > 0)
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")

    @property
    def positions(self) -> int:
        """What it takes of a context. Generation needs a token to begin with, prompt or not."""
        return self.depth + max(self.prompt, 1) + self.generated


@dataclass(frozen=True, slots=True)
class Result:
    """Tokens a second of every repetition, all sequences of the batch together.

    `first` is the speed of the first run, be it the warm-up, of a workload that is a prompt alone. `peak_bytes` is the
    most that was allocated on a GPU; None on a CPU, where nobody counts.
    """

    workload: Workload
    batch_size: int
    speeds: Sequence[float]
    first: float | None = None
    peak_bytes: int | None = None

    @property
    def mean(self) -> float:
        """Over the repetitions."""
        return statistics.fmean(self.speeds)

    @property
    def deviation(self) -> float:
        """The sample's standard deviation, 0 for a single repetition."""
        return statistics.stdev(self.speeds) if len(self.speeds) > 1 else 0.0

    def bandwidth(self, info: ModelInfo) -> float | None:
        """Bytes a second that generation has to read and write, None for prompts and for batches.

        The sequences of a batch share weights, and nobody knows beforehand how many experts.
        """
        if self.workload.prompt or self.batch_size > 1:
            return None
        return self.mean * info.decode_bytes(self.workload.depth + (self.workload.generated + 1) / 2)

    def compute_rate(self, info: ModelInfo) -> float | None:
        """Operations a second in the matrix products of a prompt, None for tests that generate."""
        if self.workload.generated:
            return None
        return self.mean * info.prefill_operations(self.workload.prompt, self.workload.depth) / self.workload.prompt

    def memory_share(self, info: ModelInfo) -> float | None:
        """The peak as a share of what weights and caches take."""
        held = info.resident_bytes + self.batch_size * info.cache_bytes(self.workload.positions)
        return None if self.peak_bytes is None else self.peak_bytes / held


class SyntheticTokens:
    """Stands where the engine expects a sampler, and puts out random tokens without a look at the logits."""

    def __init__(self, vocab_size: int, device: torch.device, count: int = 8192) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(vocab_size, (count,), generator=generator).to(device)

    def prompt(self, length: int) -> list[int]:
        """So many tokens, always the same."""
        return self._tokens[torch.arange(length, device=self._tokens.device) % len(self._tokens)].tolist()

    @property
    def graph_key(self) -> str:
        """A recording of `sample` is always valid."""
        return "synthetic"

    @property
    def sequential(self) -> bool:
        """A token depends on its position alone."""
        return False

    def set(self, slot: int, params: SamplingParams, prompt_tokens: Sequence[int]) -> None:
        """There is nothing to remember."""

    def clear(self, slot: int) -> None:
        """There is nothing to forget."""

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Draw:
        """One token a row, by its position."""
        return Draw(self._tokens[positions % len(self._tokens)])


class Bench:
    """Runs tests on one model with `batch_size` equal sequences. Raises UserError for a batch size below 1."""

    def __init__(self, model: CausalLM, *, batch_size: int = 1, prefill_step_size: int = 2048) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, but is {batch_size}")
        self._model = model
        self._batch_size = batch_size
        self._prefill_step_size = prefill_step_size
        self._tokens = SyntheticTokens(model.config.vocab_size, model.device)

    def check(self, workload: Workload) -> None:
        """Raise UserError for a workload of nothing, and for one that the context does not hold."""
        if min(workload.prompt, workload.generated, workload.depth) < 0 or workload.prompt + workload.generated == 0:
            raise UserError(f"nothing to measure in {workload}")
        limit = self._model.config.max_position_embeddings
        if workload.positions > limit:
            raise UserError(f"{workload.name} needs {workload.positions} positions, but the context holds {limit}")

    def run(
        self,
        workload: Workload,
        repetitions: int = 5,
        *,
        warm_up: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Result:
        """Measure one workload. The tokens that make up its depth are fed once, outside the time.

        `progress` is called with repetitions done and repetitions in all. Raises UserError as `check` does.
        """
        self.check(workload)
        _reset_peak(self._model.device)
        engine = self._engine(workload)
        if warm_up:
            engine.warm_up()
        depth = self._begin(engine, 0, workload.depth) if workload.depth else []
        self._prefill(engine)
        self._end(engine, depth)
        speeds = []
        if warm_up:
            speeds.append(self._speed(replace(workload, generated=min(workload.generated, 1)), engine))
        for repetition in range(repetitions):
            speeds.append(self._speed(workload, engine))
            progress(repetition + 1, repetitions)
        first = None if workload.generated else speeds[0]
        return Result(workload, self._batch_size, speeds[-repetitions:], first, _peak(self._model.device))

    def _speed(self, workload: Workload, engine: Engine) -> float:
        """Tokens a second of one run."""
        return self._batch_size * (workload.prompt + workload.generated) / self._seconds(workload, engine)

    def _seconds(self, workload: Workload, engine: Engine) -> float:
        requests = self._begin(engine, workload.depth, max(workload.prompt, 1))
        if not workload.prompt:
            self._prefill(engine)
        synchronize(self._model.device)
        start = time.perf_counter()
        if workload.prompt:
            self._prefill(engine)
        for _ in range(workload.generated):
            engine.step()
        synchronize(self._model.device)
        seconds = time.perf_counter() - start
        self._end(engine, requests)
        return seconds

    def _engine(self, workload: Workload) -> Engine:
        return Engine(
            self._model,
            max_batch=self._batch_size,
            max_context=workload.positions,
            sampler=self._tokens,
            prefill_step_size=self._prefill_step_size,
        )

    def _begin(self, engine: Engine, depth: int, prompt: int) -> list[Request]:
        """A prompt for every slot, whatever the cache holds beyond `depth`."""
        engine.cache.lengths[:] = [depth] * self._batch_size
        return [engine.add(self._tokens.prompt(prompt), SamplingParams(max_tokens=-1)) for _ in range(self._batch_size)]

    @staticmethod
    def _end(engine: Engine, requests: list[Request]) -> None:
        for request in requests:
            request.check()
            engine.finish(request)

    @staticmethod
    def _prefill(engine: Engine) -> None:
        while engine.prefilling:
            engine.step()


def _reset_peak(device: torch.device) -> None:
    """Forget what was allocated before: the engines of other tests, the ceilings' measurement, weights as read."""
    if device.type == "cuda":
        gc.collect()  # engines and their recordings refer to each other
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return peak_bytes(device) if device.type == "cuda" else None
