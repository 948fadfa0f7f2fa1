"""Weights on their way from files: every shape, type and place, and how little memory the way takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.weights import staging
from gfxlm.weights.config import QuantizationMap
from gfxlm.weights.safetensors_file import LazyTensor, open_safetensors, stacked
from gfxlm.weights.source import WeightSource
from gfxlm.weights.staging import Staging

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.uint32, torch.bfloat16, torch.float32, torch.uint8, torch.bool, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_READ", 16)


def stored(folder: Path, tensor: Tensor) -> LazyTensor:
    save_file({"before": torch.ones(3), "t": tensor, "z": torch.ones(5)}, folder / "x.safetensors")
    return open_safetensors(folder / "x.safetensors")["t"]


def fetched(lazy: LazyTensor, out: Tensor, buffer_bytes: int) -> Tensor:
    Staging(DEVICE, buffer_bytes=buffer_bytes).fetch(lazy, out)
    return out.cpu()


@pytest.mark.parametrize("buffer_bytes", [8, 24, 64, 4096])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0, 3), (7, 3), (3, 4, 5), (2, 1, 3, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_and_type(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...], buffer_bytes: int) -> None:
    tensor = torch.randint(0, 100, shape).to(dtype)
    out = torch.zeros(shape, dtype=dtype, device=DEVICE)
    assert torch.equal(fetched(stored(tmp_path, tensor), out, buffer_bytes).float(), tensor.float())


@pytest.mark.parametrize("buffer_bytes", [8, 32, 100, 4096])
@pytest.mark.parametrize("dtype", [torch.uint32, torch.float32], ids=str)
def test_places_with_gaps(tmp_path: Path, dtype: torch.dtype, buffer_bytes: int) -> None:
    tensor = torch.randint(0, 100, (3, 4, 5)).to(dtype)
    lazy = stored(tmp_path, tensor)
    whole = torch.zeros(3, 10, 5, dtype=torch.int32, device=DEVICE).view(dtype)
    assert torch.equal(fetched(lazy, whole[:, 2:6], buffer_bytes).float(), tensor.float())
    assert whole.cpu().float().sum() == tensor.float().sum()
    pairs = torch.zeros(3, 4, 5, 2, dtype=torch.int32, device=DEVICE).view(dtype)
    assert torch.equal(fetched(lazy, pairs[..., 1], buffer_bytes).float(), tensor.float())
    assert pairs.cpu().float().sum() == tensor.float().sum()


@pytest.mark.parametrize("buffer_bytes", [8, 32, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_converted_on_the_way(tmp_path: Path, dtype: torch.dtype, buffer_bytes: int) -> None:
    tensor = torch.randn(5, 7)
    out = torch.empty(5, 7, dtype=dtype, device=DEVICE)
    assert torch.equal(fetched(stored(tmp_path, tensor), out, buffer_bytes), tensor.to(dtype))


def test_stacks_and_what_is_made(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)
    part = stored(tmp_path, tensor)
    out = torch.empty(3, 4, 6, device=DEVICE)
    stack = stacked([part, part.map(lambda t: t + 1), part])
    assert torch.equal(fetched(stack, out, 32), torch.stack([tensor, tensor + 1, tensor]))
    turned = part.map(lambda t: t.mT, (6, 4))
    assert torch.equal(fetched(turned, torch.empty(6, 4, device=DEVICE), 32), tensor.mT)


def test_nothing_is_read_for_no_memory(tmp_path: Path) -> None:
    lazy = stored(tmp_path, torch.randn(4))
    (tmp_path / "x.safetensors").unlink()
    Staging(torch.device("meta")).fetch(lazy, torch.empty(4, device="meta"))


@pytest.mark.parametrize("buffer_bytes", [8, 4096])
def test_a_file_that_becomes_shorter(tmp_path: Path, buffer_bytes: int) -> None:
    lazy = stored(tmp_path, torch.randn(100))
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(250)
    with pytest.raises(UserError, match=r"x\.safetensors: the file became shorter while it was read$"):
        fetched(lazy, torch.empty(100, device=DEVICE), buffer_bytes)
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(UserError, match=r"x\.safetensors: No such file or directory$"):
        fetched(lazy, torch.empty(100, device=DEVICE), buffer_bytes)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_parts_of_a_matrix_in_a_file(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    tensors = {"a.weight": torch.randn(3, 8).to(dtypes[0]), "b.weight": torch.randn(5, 8).to(dtypes[1])}
    save_file(tensors, tmp_path / "x.safetensors")
    lazy = open_safetensors(tmp_path / "x.safetensors")
    source = WeightSource(lazy, QuantizationMap({}), dtype=torch.float32, device=DEVICE)
    weight = source.matrix(["a", "b"], [3, 5], 8)
    assert torch.equal(weight.tensor.cpu(), torch.cat([t.float() for t in tensors.values()]))  # type: ignore[attr-defined]


MEASURE = """
import json, sys
from pathlib import Path
import torch
from gfxlm.weights.config import QuantizationMap
from gfxlm.weights.safetensors_file import open_safetensors
from gfxlm.weights.source import WeightSource

def anonymous(name):
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) << 10

dtype, keep = getattr(torch, sys.argv[2]), sys.argv[3] == "keep"
tensors = open_safetensors(Path(sys.argv[1]))
source = WeightSource(tensors, QuantizationMap({}), dtype=dtype, device=torch.device("cpu"))
torch.ones(1 << 20).add(1).sum()
before = anonymous("VmRSS")
held = []
for n in range(0, len(tensors), 2):
    weight = source.matrix([str(n), str(n + 1)], [4096, 4096], 4096)
    held = [*held, weight] if keep else [weight]
print(json.dumps([anonymous("VmHWM") - before, sum(w.nbytes for w in held), held[0].nbytes]))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_a_gigabyte_needs_little_memory_beside_it(tmp_path: Path, dtype: str, keep: str) -> None:
    file, size = tmp_path / "x.safetensors", 4096 * 4096 * 2
    header = {
        f"{n}.weight": {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [n * size, (n + 1) * size]}
        for n in range(32)
    }
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + 32 * size)  # of zeros, which take no room on the disk
    words = [sys.executable, "-c", MEASURE, str(file), dtype, keep]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    peak, held, matrix = json.loads(done.stdout)
    assert held == (16 * matrix if keep == "keep" else matrix)
    # A matrix is made while the one before is still held; the buffers, and what threads and the allocator take.
    assert peak <= held + matrix + staging.STAGED * staging._BUFFER + (32 << 20)
