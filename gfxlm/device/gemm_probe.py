"""Trying BLAS libraries on the products of real models, in processes that may crash and hang.

`probe` starts `python -m gfxlm.device.gemm_probe <library> <device>` and tells it one product a line; a line comes back
for each. Whoever dies of one is started again for the rest.
"""

import json
import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from gfxlm.device import gemm
from gfxlm.device.gemm import DTYPES, ONEDNN, RIGHT, ROWS, TORCH_NAMES, TRITON, Verdict, Verdicts
from gfxlm.device.notice import notice

# (N, K): qkv, down and gate and up of Qwen3-8B; an expert's down, qkvz and the gates of Qwen3-Coder-Next.
SHAPES = ((6144, 4096), (4096, 12288), (8192, 4096), (2048, 512), (12288, 2048), (64, 2048))
START_LIMIT, LIMIT = 180.0, 60.0  # seconds: for torch to come up, and for a product
_DEATHS = 4  # after so many, a library is not worth more of the user's time
_ANSWER = "gfxlm-probe "  # libraries write to the output, too
_READY = "ready"
_SAMPLED = 16  # every so manieth column is checked: no tile of a kernel is narrower

Product = Callable[[Tensor, Tensor, Tensor], object]  # writes x (M, K) @ w (N, K).T into out (M, N)
Answer = tuple[str, str]  # outcome and detail


@dataclass(frozen=True, slots=True)
class Problem:
    """A product x (m, k) @ w (n, k).T of numbers of type `dtype` ("bfloat16")."""

    dtype: str
    m: int
    n: int
    k: int

    @property
    def kind(self) -> tuple[str, int]:
        """What a verdict is about."""
        return self.dtype, self.m


class ProbeError(RuntimeError):
    """The other process did not come up: this says nothing about a library."""


def ensure(device: torch.device) -> Verdicts:
    """The device's verdicts, after a probe if there was none. What goes wrong with that is only warned of."""
    known = gemm.verdicts(device)
    if known.found or device.type != "cuda":
        return known
    try:
        return probe(device)
    except (ProbeError, OSError) as error:  # OSError: no process could be started
        warnings.warn(f"BLAS libraries could not be tried: {error}", stacklevel=2)
        return known


def probe(
    device: torch.device,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    command: Sequence[str] = (sys.executable, "-m", "gfxlm.device.gemm_probe"),
    start_limit: float = START_LIMIT,
    limit: float = LIMIT,
) -> Verdicts:
    """Try all libraries but the last resort, and keep the verdicts. Takes a minute, and longer where one hangs.

    `command` gets the names of a library and the device as further words. ProbeError where it does not start; where
    verdicts cannot be written, they hold for this process, and it is warned of.
    """
    known = gemm.untried(device)
    classes = [(str(dtype).removeprefix("torch."), rows) for dtype in DTYPES for rows in ROWS]
    found = []
    libraries = [library for library in known.order if library not in (TRITON, ONEDNN)]
    for number, library in enumerate(libraries, 1):
        notice(
            f"trying {library} ({number} of {len(libraries)}), once for this GPU, driver and torch: about half a minute"
        )
        problems = [Problem(dtype, rows, n, k) for dtype, rows in classes for n, k in shapes]
        words = [*command, library, str(device)]
        answers = list(_answers(words, problems, start_limit, limit))
        for place, (dtype, rows) in enumerate(classes):
            outcome, detail = gemm.joined(answers[place * len(shapes) : (place + 1) * len(shapes)])
            found.append(Verdict(library, dtype, rows, outcome, detail))
    tried = replace(known, found=tuple(found))
    try:
        tried.save()
    except OSError as error:
        warnings.warn(f"what was found of BLAS libraries is not kept, every start tries again: {error}", stacklevel=3)
    return tried


def _answers(words: list[str], problems: list[Problem], start_limit: float, limit: float) -> Iterator[Answer]:
    """One answer for each problem, in their order. Where one was the end of a process, none of its class is tried."""
    deaths, done = 0, 0
    while done < len(problems):
        if deaths == _DEATHS:
            yield from [("crashed", f"not tried: it crashed or hung {deaths} times before")] * (len(problems) - done)
            return
        with _Worker(words, problems[done:]) as worker:
            if worker.next(start_limit) != _READY:
                raise ProbeError(worker.last_words())
            while done < len(problems):
                problem, line = problems[done], worker.next(limit)
                answer = json.loads(line) if isinstance(line, str) else _fate(line, limit)
                answer = answer[0], f"{problem.m}x{problem.n}x{problem.k}: {answer[1]}" if answer[1] else ""
                yield answer
                done += 1
                if not isinstance(line, str):
                    deaths += 1
                    while problems[done : done + 1] and problems[done].kind == problem.kind:
                        yield answer
                        done += 1
                    break


def _fate(status: int | None, limit: float) -> Answer:
    return ("hung", f"no answer after {limit:g} s") if status is None else ("crashed", f"status {status}")


class _Worker:
    """A child process that answers problems one after the other."""

    def __init__(self, words: list[str], problems: list[Problem]) -> None:
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._listen, self._collect)]
        for thread in self._threads:
            thread.start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([asdict(problem) for problem in problems]))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it is dead already, which is noticed when it does not answer

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()

    def next(self, limit: float) -> str | int | None:
        """What it says next, its exit status if it died, None if it says nothing for so many seconds."""
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            return None
        return self._process.wait() if line is None else line

    def last_words(self) -> str:
        """Why it died."""
        self._process.kill()
        for thread in self._threads:
            thread.join()
        return (self._errors or ["it said nothing"])[-1].strip()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                self._lines.put(line.removeprefix(_ANSWER).strip())
        self._lines.put(None)

    def _collect(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors = [*self._errors[-20:], line]


def serve(product: Product, device: torch.device) -> None:
    """Be the child process: answer the problems on the standard input with this product."""
    problems = [Problem(**fields) for fields in json.load(sys.stdin)]
    torch.empty(1, device=device)
    print(f"{_ANSWER}{_READY}", flush=True)
    for number, problem in enumerate(problems):
        try:
            answer = judge(product, problem, device, number)
        except NotImplementedError as error:
            answer = "absent", str(error)
        except RuntimeError as error:
            answer = "refused", str(error).strip().splitlines()[0]
        print(f"{_ANSWER}{json.dumps(answer)}", flush=True)


def judge(product: Product, problem: Problem, device: torch.device, seed: int = 0) -> Answer:
    """One product against float64, twice over."""
    dtype = getattr(torch, problem.dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(2):
        x, w = (torch.randn(n, problem.k, device=device, generator=generator).to(dtype) for n in (problem.m, problem.n))
        out = torch.full((problem.m, problem.n), torch.nan, dtype=dtype, device=device)
        product(x, w, out)
        columns = w[::_SAMPLED].cpu().double()
        expected, found = x.cpu().double() @ columns.mT, out[:, ::_SAMPLED].cpu().double()
        if not out.isfinite().all():
            return "not finite", f"{(~out.isfinite()).sum()} numbers of {out.numel()}"
        error, largest = (found - expected).abs().amax().item(), expected.abs().amax().item()
        # Some roundings of the type, for sums that are parted, and a random walk of fp32 ones.
        if error > (4 * torch.finfo(dtype).eps + problem.k**0.5 * 2**-23) * largest:
            return "wrong", f"off by {error / largest:.2g} of the largest number"
    return RIGHT, ""


def _blas(library: str) -> Product:
    """torch's product by that library. NotImplementedError from it where torch takes another one after all."""

    def product(x: Tensor, w: Tensor, out: Tensor) -> None:
        torch.mm(x, w.mT, out=out)

    def absent(x: Tensor, w: Tensor, out: Tensor) -> None:
        raise NotImplementedError(f"torch does not use {library} on this GPU")

    name = TORCH_NAMES[library]
    torch.backends.cuda.preferred_blas_library(name)
    taken = str(torch.backends.cuda.preferred_blas_library()).rpartition(".")[2].lower()
    return product if taken == name else absent


if __name__ == "__main__":
    serve(_blas(sys.argv[1]), torch.device(sys.argv[2]))
