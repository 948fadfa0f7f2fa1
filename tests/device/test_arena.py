"""The arena for integrated GPUs, over a stand-in for HIP that is made of malloc: it counts, fails and runs short."""

import ctypes
import gc
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gfxlm.device import memory
from gfxlm.device.arch import ARCHITECTURES, assume
from gfxlm.device.arena import Arena, arena, unified
from gfxlm.device.memory import available_bytes, count_in, peak_bytes, taken_bytes
from gfxlm.errors import UserError

SOURCE = r"""
#include <stdlib.h>
#include <string.h>
long calls, alive, fine, managed, wrong_flags, fail_at, room;
static long sizes_of(void *p, long n) { static struct { void *p; long n; } all[4096]; long found = 0;
  for (int i = 0; i < 4096; i++) {
    if (n > 0 && !all[i].p) { all[i].p = p; all[i].n = n; return n; }
    if (n == 0 && all[i].p == p) { found = all[i].n; all[i].p = 0; return found; } }
  return -1; }
static int take(void **out, size_t n, long *used, long limit) {
  calls++;
  if (fail_at && calls % fail_at == 0) return 2;
  if (*used + (long)n > limit) return 2;
  *out = malloc(n); memset(*out, 0x5a, n); sizes_of(*out, n); *used += n; alive++; return 0; }
int hipExtMallocWithFlags(void **out, size_t n, unsigned flags) {
  wrong_flags += flags != 1; return take(out, n, &fine, room); }
int hipMallocManaged(void **out, size_t n, unsigned flags) {
  wrong_flags += flags != 1; return take(out, n, &managed, 1L << 40); }
int hipFree(void *p) {
  long n = sizes_of(p, 0); if (n < 0) return 1; free(p); alive--; return 0; }
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C compiler here to make the stand-in for HIP with")
    folder = tmp_path_factory.mktemp("hip")
    (folder / "hip.c").write_text(SOURCE)
    library = folder / "libamdhip64.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, folder / "hip.c"], check=True, timeout=60)
    return library


class Stub:
    """The library, and what it counted."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("calls", "alive", "fine", "managed", "wrong_flags", "fail_at"):
            self[name] = 0
        self["room"] = 1 << 30

    def __getitem__(self, name: str) -> int:
        return ctypes.c_long.in_dll(self.library, name).value

    def __setitem__(self, name: str, value: int) -> None:
        ctypes.c_long.in_dll(self.library, name).value = value


@pytest.fixture
def stub(built: Path) -> Iterator[Stub]:
    made = Stub(built)
    yield made
    gc.collect()
    assert made["alive"] == 0
    assert made["wrong_flags"] == 0


def over(stub: Stub, free: Callable[[], int] = lambda: 1 << 30) -> Arena:
    return Arena(stub.library, torch.device("cpu"), free)


@pytest.mark.parametrize("dtype", [torch.uint32, torch.bfloat16, torch.float32, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 8), (7,), (), (1, 1)])
def test_tensors_over_blocks(stub: Stub, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = over(stub).empty(shape, dtype)
    assert (tuple(found.shape), found.dtype, found.device.type) == (shape, dtype, "cpu")
    assert found.is_contiguous()
    assert (found.view(torch.uint8) if shape else found.view(1).view(torch.uint8)).eq(0x5A).all()
    wanted = torch.randint(0, 100, shape).to(dtype)
    assert torch.equal(found.copy_(wanted), wanted)
    assert (stub["fine"], stub["managed"]) == (found.nbytes, 0)


def test_nothing_takes_no_block(stub: Stub) -> None:
    assert over(stub).empty((0, 4), torch.float32).shape == (0, 4)
    assert stub["calls"] == 0


def test_a_block_goes_with_the_last_view_of_it(stub: Stub) -> None:
    place = over(stub)
    kept = place.empty((4, 4), torch.float32)[1:].mT
    other = place.empty((8,), torch.float32)
    assert (stub["alive"], place.held_bytes) == (2, 96)
    del other
    assert (stub["alive"], place.held_bytes) == (1, 64)
    kept.fill_(1)
    del kept
    assert (stub["alive"], place.held_bytes) == (0, 0)


def test_tensors_outlive_their_arena(stub: Stub) -> None:
    found = over(stub).empty((4,), torch.float32)
    gc.collect()
    assert found.fill_(2).sum() == 8
    del found
    assert stub["alive"] == 0


def test_managed_memory_once_the_gpu_has_none(stub: Stub) -> None:
    stub["room"] = 100
    place = over(stub)
    held = [place.empty((10,), torch.float32) for _ in range(4)]
    assert (stub["fine"], stub["managed"], stub["alive"]) == (80, 80, 4)
    assert place.held_bytes == sum(x.nbytes for x in held)


def test_never_more_managed_memory_than_is_free(stub: Stub) -> None:
    stub["room"] = 0
    place = over(stub, lambda: 4_000_000 - stub["managed"])
    held = [place.empty((750_000,), torch.float32)]
    with pytest.raises(UserError, match=r"^3\.00 MB of weights .*HIP error 2.* 1\.00 MB are free$"):
        held.append(place.empty((750_000,), torch.float32))
    assert (stub["managed"], stub["alive"]) == (3_000_000, 1)


def test_managed_memory_counts_before_it_is_written_to(stub: Stub) -> None:
    """The host says that as much is free as before: nobody has touched the pages yet."""
    stub["room"] = 0
    place = over(stub, lambda: 4_000_000)
    held = [place.empty((750_000,), torch.float32)]
    with pytest.raises(UserError, match=r"1\.00 MB are free$"):
        place.empty((750_000,), torch.float32)
    held.clear()
    assert place.empty((1_000_000,), torch.float32).nbytes == 4_000_000


def test_what_it_holds_is_taken_from_the_gpu(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, other = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(memory, "_holders", defaultdict(list))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 150)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5000, 10_000))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=True))
    place = over(stub)
    count_in(place, gpu)
    held = place.empty((250,), torch.float32)
    assert (taken_bytes(gpu), taken_bytes(torch.device("cuda")), taken_bytes(other)) == (1100, 1100, 100)
    assert available_bytes(gpu, limit=3000) == 1900
    assert (available_bytes(gpu), available_bytes(gpu, limit=1000)) == (5000, 0)
    del held
    assert (taken_bytes(gpu), peak_bytes(gpu)) == (100, 1150)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("room", [0, 500, 1 << 20])
def test_failures_leak_nothing(stub: Stub, every: int, room: int) -> None:
    stub["fail_at"], stub["room"] = every, room
    place = over(stub)
    held, refused = [], []
    for count in range(1, 40):
        try:
            held.append(place.empty((count,), torch.float64).fill_(count))
        except UserError as error:
            refused.append((count, str(error)))
    for count, message in refused:
        assert message.startswith(f"{8 * count} bytes of weights were refused: HIP errors 2 ")
        assert message.endswith("although 1.07 GB are free")
    assert all((x == len(x)).all() for x in held)
    assert stub["alive"] == len(held) == 39 - len(refused)
    assert place.held_bytes == sum(x.nbytes for x in held)
    always = every == 1 or (every == 2 and room == 0)  # of the two calls, the second one fails too
    assert (len(held) == 0) == always


def test_the_end_of_the_program_frees_or_leaves_them(built: Path) -> None:
    program = f"""
import ctypes, torch
from gfxlm.device.arena import Arena
place = Arena(ctypes.CDLL({str(built)!r}), torch.device("cpu"))
ctypes.c_long.in_dll(ctypes.CDLL({str(built)!r}), "room").value = 1 << 30
kept = place.empty((1000,), torch.float32)
torch.nn.Module.kept = [kept.view(10, 100)]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_which_parts_have_one() -> None:
    cpu, found = torch.device("cpu"), set()
    for name, arch in ARCHITECTURES.items():
        with assume(arch):
            if unified(cpu):
                found.add(name)
            assert arena(cpu) is None
    assert found == {"gfx1103", "gfx1150", "gfx1151", "gfx1152"}
