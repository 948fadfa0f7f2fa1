"""How fast weights come from a disk, as a share of what plain reads of the same files get from it.

    python -m benchmarks.loading [--layers 12] [--device cuda] [--runs 5] [--folder /scratch]

Writes a checkpoint in Qwen3-8B's shapes with so many layers (12 take 2 GB), and reads it cold, by turns: plainly, with
as many threads and as large pieces as gfxlm's; through gfxlm's staging to where weights stay; and as a model is loaded,
which on a CPU also packs codes anew. Medians, and each one's share of the plain reads'.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from statistics import median

import torch

from gfxlm.device.ceilings import synchronize
from gfxlm.device.select import pick_device
from gfxlm.models.load import load_model
from gfxlm.models.synthetic import PUBLISHED, synthetic_checkpoint
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.safetensors_file import Extent, LazyTensor
from gfxlm.weights.save import TensorGroup, TensorSpec, write_weights
from gfxlm.weights.staging import Staging

_READERS, _READ = 8, 4 << 20


def write(folder: Path, layers: int, device: torch.device) -> Checkpoint:
    """A checkpoint of random weights in files."""
    (folder / "config.json").write_text(json.dumps(PUBLISHED["qwen3-8b"] | {"num_hidden_layers": layers}))
    made = synthetic_checkpoint(str(folder), device)

    def group(name: str, tensor: LazyTensor) -> TensorGroup:
        return TensorGroup({name: TensorSpec(tensor.shape, tensor.dtype)}, lambda: iter([[tensor.read().cpu()]]))

    parameters = sum(prod(tensor.shape) for tensor in made.tensors.values())
    write_weights(folder, [group(*item) for item in made.tensors.items()], parameters)
    (folder / "config.json").write_text(json.dumps(made.config))
    return Checkpoint.open(folder)


def forget(files: list[Path]) -> None:
    """Have the kernel drop what it keeps of these files, so that the disk is read."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(files: list[Path]) -> None:
    """Read the files, piece by piece, to nowhere."""
    pieces = [
        Extent(path, start, min(_READ, size - start))
        for path in files
        for size in [path.stat().st_size]
        for start in range(0, size, _READ)
    ]

    def read(number: int) -> None:
        buffer = torch.empty(_READ, dtype=torch.uint8)
        for piece in pieces[number::_READERS]:
            piece.read_into(buffer[: piece.nbytes])

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read, range(_READERS)))


def staged(checkpoint: Checkpoint, device: torch.device) -> None:
    """Read every tensor to its place, one place for all of a shape."""
    staging, places = Staging(device), dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor]()
    for tensor in checkpoint.tensors.values():
        kind = tensor.shape, tensor.dtype
        if kind not in places:
            places[kind] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        staging.fetch(tensor, places[kind])
    synchronize(device)


def loaded(checkpoint: Checkpoint, device: torch.device) -> None:
    """Load the model."""
    load_model(checkpoint, device=device)
    synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is meant; by default that of temporary files")
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        checkpoint = write(Path(name), args.layers, device)
        files = sorted(Path(name).glob("*.safetensors"))
        nbytes = sum(file.stat().st_size for file in files)
        ways: dict[str, Callable[[], None]] = {
            "plain reads": lambda: plain(files),
            "staged": lambda: staged(checkpoint, device),
            "loaded": lambda: loaded(checkpoint, device),
        }
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.runs):
            for way, run in ways.items():
                forget(files)
                start = time.perf_counter()
                run()
                speeds[way].append(nbytes / 1e9 / (time.perf_counter() - start))
    print(f"{nbytes / 1e9:.2f} GB to {device}, {args.runs} runs of each, cold; GB/s: median (least to most)")
    for way, found in speeds.items():
        share = median(found) / median(speeds["plain reads"])
        print(f"{way:<12} {median(found):6.2f} ({min(found):.2f} to {max(found):.2f})  {share:.0%}")


if __name__ == "__main__":
    main()
