"""`gfxlm doctor`: every check of a machine, those that run something on its device last."""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gfxlm.device import doctor as machine
from gfxlm.device.arch import Architecture, architecture, named
from gfxlm.device.ceilings import matmul_rate, read_bandwidth, synchronize
from gfxlm.device.doctor import Host, this_host
from gfxlm.device.finding import Finding, examined
from gfxlm.device.gemm import RIGHT, verdicts
from gfxlm.device.gemm_probe import ensure
from gfxlm.device.graph import Graph, shared_pool
from gfxlm.device.versions import triton_there
from gfxlm.engine.load import BUILT_IN, open_checkpoint
from gfxlm.engine.self_test import check
from gfxlm.models.load import load_model
from gfxlm.ops import rms_norm

# Below these shares of what the data sheet says, something is wrong; good drivers reach 80 % and 60 %.
_LEAST_BANDWIDTH, _LEAST_RATE = 0.6, 0.35
_COMPILED_FOR, _COMPILED_CASE = "gfx1151", "rms_norm/1x2048"
_TINY_KERNELS, _REPLAYS = 64, 50
_SLOW_REPLAY = 50.0  # µs

Check = Callable[[Host], Iterator[Finding]]


def diagnose(device: torch.device, *, quick: bool = False) -> Iterator[tuple[str, Finding]]:
    """Sections and findings, each as soon as it is known. `quick` leaves out what takes long."""
    host = this_host(device)
    sections: dict[str, tuple[Check, ...]] = {
        **machine.SECTIONS,
        "speed": () if quick else (bandwidth, matrix_rate),
        "kernels": (known_blas if quick else blas, compiler, graph),
        "numerics": (main_numerics if quick else numerics,),
    }
    for section, checks in sections.items():
        for one in checks:
            for finding in examined(one, host):
                yield section, finding


def bandwidth(host: Host) -> Iterator[Finding]:
    """How fast memory is read, beside what the part should give."""
    measured, arch = read_bandwidth(host.device) / 1e9, _part(host)
    yield _compared("read bandwidth", measured, arch.bandwidth if arch else 0.0, "GB/s", _LEAST_BANDWIDTH, arch, "")


def matrix_rate(host: Host) -> Iterator[Finding]:
    """How fast bfloat16 matrices are multiplied by torch, beside what the part should give."""
    measured, arch = matmul_rate(host.device) / 1e12, _part(host)
    fix = "torch's BLAS is slow here: export TORCH_BLAS_PREFER_HIPBLASLT=1, and see what is said of BLAS"
    yield _compared(
        "matrix rate", measured, arch.matrix_rate / 1e12 if arch else 0.0, "TFLOP/s", _LEAST_RATE, arch, fix
    )


def _part(host: Host) -> Architecture | None:
    """The device's architecture, if the part is the one that its figures are of."""
    arch = architecture(host.device)
    own = next((gpu for gpu in host.gpus if gpu.index == (host.device.index or 0)), None)
    same = host.device.type == "cuda" and own is not None and (own.arch, own.units) == (arch.name, arch.units)
    return arch if same else None


def _compared(
    name: str, measured: float, expected: float, unit: str, least: float, arch: Architecture | None, fix: str
) -> Finding:
    data = {"measured": measured, "expected": expected or None, "unit": unit}
    if not expected or arch is None:
        return Finding(name, f"{measured:.4g} {unit}", data=data)
    share = measured / expected
    text = f"{measured:.4g} {unit}, {share:.0%} of {expected:.4g} ({arch.example})"
    if share >= least:
        return Finding(name, text, data=data)
    other = "is something else using the GPU, or is it set to save power?"
    return Finding(name, text, "warning", fix or other, data)


def blas(host: Host) -> Iterator[Finding]:
    """Which BLAS libraries are right, after a probe if nobody has tried them yet."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ensure(host.device)
    for warning in caught:
        yield Finding("BLAS", str(warning.message), "warning", "gfxlm tune --blas tries again")
    yield from known_blas(host)


def known_blas(host: Host) -> Iterator[Finding]:
    """What is known of BLAS libraries."""
    known = verdicts(host.device)
    tried = {verdict.library for verdict in known.found if verdict.outcome == RIGHT}
    order = ", ".join(f"{library}{' (right)' if library in tried else ''}" for library in known.order)
    yield Finding("BLAS", f"{order}{'' if known.found else ': not tried'}", data={"order": known.order})
    for bad in known.bad:
        instead = known.chosen(getattr(torch, bad.dtype), bad.rows)
        yield Finding(
            f"BLAS {bad.library}", f"{bad.outcome} for {bad.dtype} to {bad.rows} rows {bad.detail}".strip(), "warning",
            f"nothing need be done, {instead} is used; a newer ROCm or torch may have it right",
            {"library": bad.library, "dtype": bad.dtype, "rows": bad.rows, "outcome": bad.outcome},
        )  # fmt: skip


def compiler(host: Host) -> Iterator[Finding]:
    """Whether Triton compiles, and what it compiled runs; without a GPU, whether it compiles for one."""
    if not triton_there():
        return
    yield _cache_folder()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        yield Finding("compiler", "TRITON_INTERPRET is set: nothing is compiled", "warning", "unset TRITON_INTERPRET")
    elif host.device.type == "cuda":
        yield _compiled_and_run(host.device)
    else:
        yield _compiled_for_another(architecture(host.device))


def _compiled_and_run(device: torch.device) -> Finding:
    x = torch.linspace(-3, 5, 3000, device=device).view(3, 1000)
    if not architecture(device).kernels:
        return Finding("compiler", "not needed: there are no kernels for this GPU")
    start = time.perf_counter()
    y = rms_norm(x, None, 1e-6).cpu()
    seconds = time.perf_counter() - start
    wide = x.double().cpu()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if (y - exact).abs().max() > 1e-5 * exact.abs().max():
        return Finding("compiler", "a kernel was compiled and computes nonsense", "error", "see what is said of Triton")
    return Finding("compiler", f"a kernel was compiled and run in {seconds:.2f} s", data={"seconds": seconds})


def _compiled_for_another(assumed: Architecture) -> Finding:
    from gfxlm.kernels.codegen import compile_job, jobs

    arch = assumed if assumed.vendor == "amd" and assumed.kernels else named(_COMPILED_FOR)
    [job] = jobs([arch], [_COMPILED_CASE])
    start = time.perf_counter()
    done = compile_job(job)
    if done.error:
        return Finding("compiler", f"fails for {arch.name}: {done.error}", "warning", "install a newer Triton")
    seconds = time.perf_counter() - start
    return Finding("compiler", f"a kernel was compiled for {arch.name} in {seconds:.2f} s", data={"seconds": seconds})


def _cache_folder() -> Finding:
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if os.access(there, os.W_OK | os.X_OK):
        return Finding("kernel cache", str(folder))
    fix = "set TRITON_CACHE_DIR to a folder that can be written, or every start compiles anew"
    return Finding("kernel cache", f"{folder}: cannot be written", "warning", fix)


def graph(host: Host) -> Iterator[Finding]:
    """Whether steps can be recorded, how long a kernel in a recording takes at least, and what a replay costs."""
    if host.device.type != "cuda":
        yield Finding("recorded steps", "there is no GPU to record on")
        return
    counter = torch.zeros(64, device=host.device)

    def count() -> None:
        for _ in range(_TINY_KERNELS):
            counter.add_(1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if (pool := shared_pool(host.device)) is not None:
            recorded = Graph(count, host.device, pool=pool)
            recorded.capture()
    if caught:
        yield Finding(
            "recorded steps", f"no: {caught[0].message}", "warning",
            "steps run kernel by kernel, and the host decides the speed; a newer driver and torch may record",
        )  # fmt: skip
        return
    counter.zero_()
    synchronize(host.device)
    start = time.perf_counter()
    for _ in range(_REPLAYS):
        recorded.replay()
    launched = time.perf_counter()
    synchronize(host.device)
    whole, launch = ((end - start) / _REPLAYS * 1e6 for end in (time.perf_counter(), launched))
    recorded.reset()
    kernel = whole / _TINY_KERNELS
    text = f"yes: {kernel:.2f} µs a kernel, the host takes {launch:.0f} µs a replay"
    data = {"kernel_us": kernel, "replay_us": whole, "launch_us": launch}
    if not bool((counter == _REPLAYS * _TINY_KERNELS).all()):
        yield Finding("recorded steps", "replays compute nonsense", "error", "export GFXLM_NO_GRAPH=1", data)
    elif kernel > _SLOW_REPLAY:
        fix = "something keeps the GPU from working on: a profiler, AMD_SERIALIZE_KERNEL, or an old driver"
        yield Finding("recorded steps", text, "warning", fix, data)
    else:
        yield Finding("recorded steps", text, data=data)


def main_numerics(host: Host) -> Iterator[Finding]:
    """One layer of each kind of the built-in model on the device, in its own type, held against float64."""
    yield from _numerics(host, torch.bfloat16)


def numerics(host: Host) -> Iterator[Finding]:
    """The same in every type."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from _numerics(host, dtype)


def _numerics(host: Host, dtype: torch.dtype) -> Iterator[Finding]:
    name = str(dtype).removeprefix("torch.")
    try:
        faults = check(load_model(open_checkpoint(BUILT_IN), dtype=dtype, device=host.device))
    except Exception as error:  # a model that cannot be run is no model that is run right
        reason = " ".join(str(error).split())[:300]
        yield Finding(name, f"failed with {type(error).__name__}: {reason}", "error", "please report this")
        return
    for fault in faults:
        yield Finding(
            name, str(fault), "error", "text would be wrong: try a newer driver and torch, and please report this",
            {"place": fault.place, "kind": fault.kind, "rows": fault.rows, "error": min(fault.error, 1e300)},
        )  # fmt: skip
    if not faults:
        yield Finding(name, "every kind of layer, the head and the sampler compute what they should")
