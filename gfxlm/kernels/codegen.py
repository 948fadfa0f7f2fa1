"""Compile cases for architectures that need not be there: for the counts of their machine code, and to warm the cache.

A job is one case on one architecture, done in a process of its own pool. Compiled code lies in Triton's cache, so what
was interrupted continues where it stopped.
"""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gfxlm.device.arch import Architecture, recognized
from gfxlm.errors import UserError
from gfxlm.kernels.case import Case
from gfxlm.kernels.cases import catalogue
from gfxlm.kernels.gates import MATVEC_TOPICS

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """A case, named, on an architecture. `source` knows the cases that are not in the catalogue by their names."""

    arch: str
    topic: str
    case: str
    source: Callable[[str], Case] | None = None

    def find(self) -> Case:
        """The case."""
        if self.source is not None:
            return self.source(self.case)
        return next(case for case in catalogue([self.topic])[self.topic] if case.name == self.case)


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a job: a row of counts for each launch (AMD only), how many were compiled now; or an error."""

    job: Job
    rows: list[Row] = field(default_factory=list)
    compiled: int = 0
    error: str = ""


def jobs(archs: list[Architecture], ops: list[str] | None = None) -> list[Job]:
    """Every case of these operations on every one of the architectures, the headline cases first."""
    cases = [(topic, case) for topic, found in catalogue(ops).items() for case in found]
    cases.sort(key=lambda pair: not pair[1].headline)
    return [Job(arch.name, topic, case.name) for arch in archs for topic, case in cases]


def identities(job: Job) -> list[list[str]]:
    """What the machine code of a job's launches depends on; see `assembly.identity`. Compiles nothing."""
    from gfxlm.kernels.assembly import identity
    from gfxlm.kernels.record import record

    arch = recognized(job.arch)
    return [list(identity(launch.specialize(arch))) for launch in record(job.find(), arch)]


def compile_job(job: Job) -> Done:
    """Compile each launch of a job in this process."""
    from triton import knobs

    from gfxlm.kernels.assembly import count
    from gfxlm.kernels.record import record

    hits: list[bool] = []
    knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
    arch = recognized(job.arch)
    rows = []
    try:
        for launch in record(job.find(), arch):
            code = launch.specialize(arch)
            compiled = code.compile()
            if arch.vendor == "amd":
                rows.append(count(code, compiled, arch, walked=job.topic in MATVEC_TOPICS).row())
    except Exception as error:  # the compiler's own are of many kinds
        reason = " ".join(str(error).split())[-300:]  # Triton's comes after the lines of the kernel
        return Done(job, error=f"{type(error).__name__}: {reason}")
    finally:
        knobs.compilation.listener = None
    return Done(job, rows, hits.count(False))


def compile_all(
    todo: list[Job], workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Iterator[Done]:
    """Compile jobs in parallel processes, and yield each as it is done. UserError under Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set: Triton compiles nothing then; unset it")
    results = _in_processes(todo, min(workers or available_cores(), max(1, len(todo))))
    for done, result in enumerate(results, 1):
        if progress is not None:
            progress(done, len(todo))
        yield result


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(todo: list[Job], workers: int) -> Iterator[Done]:
    finished: set[Job] = set()
    with _pool(workers) as pool:
        with _interrupts_ignored():  # the processes that submitting starts inherit that: Ctrl-C is for this one
            futures = [pool.submit(compile_job, job) for job in todo]
        try:
            for future in as_completed(futures):
                try:
                    result = future.result()
                except BrokenProcessPool:
                    break
                finished.add(result.job)
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    # The compiler took its process down: whatever is left gets a process of its own.
    for job in todo:
        if job not in finished:
            with _pool(1) as pool:
                try:
                    yield pool.submit(compile_job, job).result()
                except BrokenProcessPool:
                    yield Done(job, error="the compiler crashed")


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not forked: torch and LLVM have threads.
    quiet = partial(warnings.simplefilter, "ignore")
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=quiet)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
