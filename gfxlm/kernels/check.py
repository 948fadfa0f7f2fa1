"""Hold the manifest against today's kernels, and bring it up to date."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import triton

from gfxlm.device.arch import named
from gfxlm.kernels.codegen import Done, Job, compile_all, identities, jobs
from gfxlm.kernels.gates import failures
from gfxlm.kernels.manifest import FOLDER, TARGETS, Entry, read, write

_WRITE_EVERY = 20


def entry_of(done: Done) -> Entry:
    """What the manifest says about a case that was compiled."""
    case = done.job.find()
    return {"topic": done.job.topic, "nbytes": case.nbytes, "flops": case.flops, "launches": done.rows}


def is_current(job: Job, entry: Entry | None) -> bool:
    """Whether a case's entry is of what would be compiled today."""
    case = job.find()
    if entry is None or (entry["nbytes"], entry["flops"]) != (case.nbytes, case.flops):
        return False
    return identities(job) == [[row["kernel"], row["key"], row["source"]] for row in entry["launches"]]


def stale(archs: tuple[str, ...] = TARGETS, folder: Path = FOLDER) -> list[str]:
    """A line for every case whose entry is missing or of something else than would be compiled today."""
    found = []
    for arch in archs:
        cases = read(arch, folder)["cases"]
        every = jobs([named(arch)])
        found += [f"{arch}: {job.case}" for job in every if not is_current(job, cases.get(job.case))]
        found += [f"{arch}: {name} is no longer a case" for name in sorted({*cases} - {job.case for job in every})]
    return found


def update(
    archs: tuple[str, ...],
    ops: list[str] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    folder: Path = FOLDER,
) -> list[str]:
    """Compile what the manifest lacks and write it down as it comes; a line for each thing that does not hold."""
    records = {arch: _still_valid(arch, folder) for arch in archs}
    todo = [
        job
        for arch, record in records.items()
        for job in jobs([named(arch)], ops)
        if not is_current(job, record["cases"].get(job.case))
    ]
    complaints = []
    for number, done in enumerate(compile_all(todo, workers, progress), 1):
        record = records[done.job.arch]
        if done.error:
            record["cases"].pop(done.job.case, None)
            complaints.append(f"{done.job.arch}: {done.job.case}: {done.error}")
        else:
            record["cases"][done.job.case] = entry_of(done)
        if number % _WRITE_EVERY == 0:
            write(done.job.arch, record, folder)
    for arch, record in records.items():
        write(arch, record, folder)
        for name, entry in sorted(record["cases"].items()):
            complaints += [f"{arch}: {name}: {line}" for line in failures(entry, named(arch))]
    return complaints


def _still_valid(arch: str, folder: Path) -> Entry:
    record = read(arch, folder)
    if record["triton"] != triton.__version__:
        return {"triton": triton.__version__, "cases": {}}
    every = {job.case for job in jobs([named(arch)])}
    return {**record, "cases": {name: entry for name, entry in record["cases"].items() if name in every}}


def sample(archs: tuple[str, ...], number: int, seed: str) -> list[Job]:
    """Jobs that the seed chooses, the same ones for the same seed."""
    every = jobs([named(arch) for arch in archs])
    return sorted(every, key=lambda job: hashlib.sha256(f"{seed} {job}".encode()).digest())[:number]


def differences(done: Done, folder: Path = FOLDER) -> list[str]:
    """What a compiled job holds against the manifest, a line each; counts only where the Triton is the manifest's."""
    arch = named(done.job.arch)
    where = f"{arch.name}: {done.job.case}"
    if done.error:
        return [f"{where}: {done.error}"]
    fresh = entry_of(done)
    record = read(arch.name, folder)
    found = [f"{where}: {line}" for line in failures(fresh, arch)]
    if record["triton"] == triton.__version__ and record["cases"].get(done.job.case) != fresh:
        found.append(f"{where}: its counts are not the manifest's")
    return found
