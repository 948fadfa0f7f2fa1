"""Many rude clients at one server, for minutes: every answer right, nothing lost, nothing left behind.

    python -m benchmarks.soak --minutes 5 --clients 64 [--batch-invariant]

Starts `gfxlm serve` with the built-in model as a process of its own. Clients ask for texts of prompts with shared
beginnings, streamed or whole, and leave, set deadlines that pass, send bodies that are too large or wrong. Greedy
answers are held against those that the same server gave beforehand to one client alone: they are equal, or part
where the two likeliest tokens were next to equal, which company may turn over; with --batch-invariant they are equal.
At the end counters are at zero, the log has no exception, and memory is where it was. Exits with 1 if not.
"""

import argparse
import asyncio
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import httpx

from benchmarks.rude_clients import MAX_BODY, PATIENCE, Soak, references

MAX_CONTEXT = 1024
GROWTH = 1.1  # of memory, between the second quarter of the time and the last


class Server:
    """`gfxlm serve` in a process; `log` is what it has written."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._log = folder / "server.log"
        limits = ["--max-body-size", str(MAX_BODY), "--max-context", str(MAX_CONTEXT)]
        command = [sys.executable, "-m", "gfxlm", "serve", "--port", "0", *limits, *options]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def address(self, seconds: float = 120.0) -> str:
        """Where it listens, once it is healthy."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            found = re.search(r"listening on (http://[\d.:]+)", self.log)
            if found and _healthy(found[1]):
                return found[1]
            time.sleep(0.1)
        self.process.kill()
        raise RuntimeError(f"the server did not come up:\n{self.log}")

    def end(self, seconds: float = 60.0) -> int:
        """SIGTERM, and its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return -1


def _healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


async def measured(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's metrics by name; those of several labels are added up."""
    values: Counter[str] = Counter()
    for line in (await client.get("/metrics")).text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name.partition("{")[0]] += float(value)
    return values


async def _watch(client: httpx.AsyncClient, memory: list[float]) -> None:
    while True:
        memory.append((await measured(client))["process_resident_memory_bytes"])
        await asyncio.sleep(1)


async def _settled(client: httpx.AsyncClient, before: dict[str, float], soak: Soak) -> None:
    """Counters go back to what they were, soon after the last client has left."""
    zeros = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    values: dict[str, float] = {}
    for _ in range(100):
        values = await measured(client)
        if not any(values[name] for name in zeros):
            break
        await asyncio.sleep(0.1)
    for name in zeros:
        if name not in values or values[name]:
            soak.fault(f"{name} is {values.get(name)} at the end")
    if values["process_open_fds"] > before["process_open_fds"] + 4:
        soak.fault(f"{values['process_open_fds']:.0f} files are open, {before['process_open_fds']:.0f} were before")


async def soak(address: str, *, seconds: float, clients: int, exact: bool, seed: int = 0) -> tuple[Soak, list[float]]:
    """Let the clients loose on a server; what they found, and its memory in bytes, once a second."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients // 2)
    async with httpx.AsyncClient(base_url=address, timeout=httpx.Timeout(PATIENCE), limits=httpx.Limits()) as alone:
        known = await references(alone)
        before = await measured(alone)
        memory: list[float] = []
        watch = asyncio.create_task(_watch(alone, memory))
        async with httpx.AsyncClient(base_url=address, timeout=httpx.Timeout(PATIENCE), limits=limits) as client:
            found = Soak(client, known, exact, random.Random(seed))
            end = time.monotonic() + seconds
            await asyncio.gather(*(found.run_client(end) for _ in range(clients)))
        watch.cancel()
        await _settled(alone, before, found)
        again = await references(alone)
        if [one.text for one in again] != [one.text for one in known]:
            found.fault("alone again, answers are others than before")
    return found, memory


def run(*, seconds: float, clients: int, exact: bool, options: Sequence[str] = ()) -> tuple[Soak, list[float]]:
    """Start a server, soak it, end it; the log's exceptions and a bad end are faults too."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), *options, *(["--batch-invariant"] if exact else []))
        try:
            found, memory = asyncio.run(soak(server.address(), seconds=seconds, clients=clients, exact=exact))
        finally:
            status = server.end()
        if status:
            found.fault(f"the server ended with {status}")
        for match in re.finditer(
            r".*(?:Traceback|ERROR|Exception ignored|was never retrieved).*(?:\n.*){0,12}", server.log
        ):
            found.fault(f"in the log: {match[0]}")
    quarter = len(memory) // 4
    if quarter > 5 and median(memory[-quarter:]) > GROWTH * median(memory[quarter : 2 * quarter]):
        found.fault(f"memory grew from {memory[quarter] / 2**20:.0f} to {memory[-1] / 2**20:.0f} MiB")
    return found, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--batch-invariant", action="store_true")
    arguments = parser.parse_args()
    options = ["--max-concurrency", "16", "--max-queue", "32"]
    start = time.monotonic()
    seconds, exact = arguments.minutes * 60, arguments.batch_invariant
    found, memory = run(seconds=seconds, clients=arguments.clients, exact=exact, options=options)
    for name, count in sorted(found.counts.items()):
        print(f"{count:7d}  {name}")
    tenths = [memory[(len(memory) - 1) * i // 10] / 2**20 for i in range(11)]
    print(f"{found.counts.total()} requests in {time.monotonic() - start:.0f} s, {found.parted} parted at a near tie")
    print(f"memory in MiB, at each tenth of the time: {' '.join(f'{size:.0f}' for size in tenths)}")
    for text, count in Counter(found.faults).most_common(20):
        print(f"FAULT ({count} times): {text}")
    sys.exit(bool(found.faults))


if __name__ == "__main__":
    main()
