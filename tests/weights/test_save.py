"""Our writer against safetensors' and MLX's own readers and mlx-lm's sharding, and against a disk that fails."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import _decode_tagged_floats, make_shards
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.weights.config import read_json
from gfxlm.weights.safetensors_file import DTYPES
from gfxlm.weights.save import TensorGroup, TensorSpec, check_output, complete_folder, write_config, write_weights
from tests.mlx_bridge import to_torch


def group_of(tensors: dict[str, Tensor], rows: int = 2) -> TensorGroup:
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def blocks() -> Iterator[tuple[Tensor, ...]]:
        return zip(*(t.split(rows) if t.ndim else (t,) for t in tensors.values()), strict=True)

    return TensorGroup(specs, blocks)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


def assert_equal(a: Tensor, b: Tensor) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert torch.equal(bits(a), bits(b))


def test_every_type_reads_back_with_safetensors(tmp_path: Path) -> None:
    tensors = {f"odd {n}": (torch.randn(5, 3) * 9).to(dtype) for n, dtype in enumerate(DTYPES.values())}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(4, 0), "transposed": torch.randn(3, 4).mT}
    write_weights(tmp_path, [group_of({name: tensor}) for name, tensor in tensors.items()], 1)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_equal(found[name], tensor)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}


def test_mlx_reads_it(tmp_path: Path) -> None:
    tensors = {
        "w": torch.arange(12).reshape(4, 3).to(torch.uint32),
        "s": torch.randn(4, 5).to(torch.bfloat16),
        "b": torch.randn(4, 7),
    }
    write_weights(tmp_path, [group_of(tensors)], 1)
    found = mx.load(str(tmp_path / "model.safetensors"))
    for name, tensor in tensors.items():
        assert_equal(to_torch(found[name]), tensor)


def test_data_are_aligned_and_without_holes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(1, dtype=torch.bfloat16),
        "c": torch.zeros(3, dtype=torch.uint32),
        "d": torch.zeros(1, dtype=torch.int64),
    }
    write_weights(tmp_path, [group_of({name: tensor}, 3) for name, tensor in tensors.items()], 1)
    length, header = header_of(tmp_path / "model.safetensors")
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    ranges = sorted(header[name]["data_offsets"] for name in tensors)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert (tmp_path / "model.safetensors").stat().st_size == 8 + length + ranges[-1][1]


class Bytes(int):
    """A limit that mlx-lm believes to be in GB."""

    def __lshift__(self, _: int) -> int:
        return int(self)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), limit=st.integers(1, 100))
def test_shards_are_grouped_as_mlx_lm_does(sizes: list[int], limit: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {f"t{n}": torch.full((size,), n, dtype=torch.uint8) for n, size in enumerate(sizes)}
    write_weights(folder, [group_of({name: t}, 50) for name, t in tensors.items()], 17, max_shard_bytes=limit)
    expected = make_shards({name: SimpleNamespace(nbytes=t.nbytes) for name, t in tensors.items()}, Bytes(limit))
    files = sorted(folder.glob("*.safetensors"))
    assert [set(load_file(file)) for file in files] == [set(shard) for shard in expected]
    count = len(files)
    names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    assert [file.name for file in files] == (["model.safetensors"] if count == 1 else names)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes), "total_parameters": 17}
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert list(index["weight_map"]) == sorted(tensors)
    for file in files:
        for name, tensor in load_file(file).items():
            assert_equal(tensor, tensors[name])
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float16), r"rows: torch\.float16 \(2, 3\) is not what was planned"),
        (torch.zeros(3, 3), r"rows: torch\.float32 \(3, 3\) is not what was planned"),
        (torch.zeros(1, 3), "blocks: rows are missing for x"),
    ],
)
def test_rows_other_than_planned_are_refused(block: Tensor, message: str, tmp_path: Path) -> None:
    group = TensorGroup({"x": TensorSpec((2, 3), torch.float32)}, lambda: iter([(block,)]))
    with pytest.raises(ValueError, match=message):
        write_weights(tmp_path, [group], 6)


def test_too_little_room_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Iterator[tuple[Tensor, ...]]:
        raise AssertionError

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1999))
    group = TensorGroup({"x": TensorSpec((500,), torch.float32)}, never)
    with pytest.raises(UserError, match=r"disk full: the weights take 2,000 bytes, the disk of .* has 1,999 free"):
        write_weights(tmp_path, [group], 500)
    assert list(tmp_path.iterdir()) == []


def test_config_is_sorted_and_valid_json(tmp_path: Path) -> None:
    config = {"z": 1.5, "a": [float("inf"), {"b": -float("inf")}], "m": {"y": 1, "x": float("nan")}, "t": (1, "ü")}
    write_config(tmp_path, config)
    text = (tmp_path / "config.json").read_text()
    plain = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(plain) == ["a", "m", "t", "z"]
    assert list(plain["m"]) == ["y", "x"]
    for found in (read_json(tmp_path / "config.json"), _decode_tagged_floats(plain)):
        assert repr(found) == repr({"a": config["a"], "m": config["m"], "t": [1, "ü"], "z": 1.5})


MODEL = ("config.json", "model.safetensors")


def make(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(str(folder))
    return folder


def test_outputs_that_may_be_written_or_replaced(tmp_path: Path) -> None:
    check_output(tmp_path / "new", force=False)
    check_output(tmp_path / "new", force=True)
    check_output(make(tmp_path / "empty"), force=True)
    check_output(make(tmp_path / "model", "config.json", "model.safetensors", "notes.txt"), force=True)


@pytest.mark.parametrize("names", [(), MODEL])
def test_existing_outputs_need_force(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exists already.*--force"):
        check_output(make(tmp_path / "out", *names), force=False)


@pytest.mark.parametrize(
    "names", [("notes.txt",), ("config.json",), ("config.json", "main.js"), ("model.safetensors",)]
)
def test_force_replaces_no_folder_that_is_not_a_model(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a model folder"):
        check_output(make(tmp_path / "out", *names), force=True)


def test_force_replaces_no_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="not a folder"):
        check_output(tmp_path / "out", force=True)


def test_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with complete_folder(out) as partial:
        (partial / "a").write_text("new")
        assert partial.parent == out.parent
        assert partial.name.startswith(".out.partial-")
        assert not out.exists()
    assert (out / "a").read_text() == "new"
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode == make(tmp_path / "plain").stat().st_mode


def test_files_are_on_the_disk_before_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, synced, fsync = tmp_path / "out", set(), os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        synced.add((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, out.exists()))

    monkeypatch.setattr(os, "fsync", record)
    with complete_folder(out) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").touch()
    assert synced == {("file", False), ("sub", False), (partial.name, False), (tmp_path.name, True)}


def test_folder_replaces_the_old_one(tmp_path: Path) -> None:
    out = make(tmp_path / "out", *MODEL)
    with complete_folder(out, force=True) as partial:
        (partial / "new").touch()
        assert (out / "config.json").exists()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = make(tmp_path / "out", *MODEL), Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(UserError, match="Device or resource busy"), complete_folder(out, force=True) as partial:
        (partial / "new").touch()
    assert sorted(p.name for p in out.iterdir()) == sorted(MODEL)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, r"disk full: .*/out was not written"),
        (OSError(errno.EDQUOT, "Quota exceeded"), UserError, r"disk full: .*/out was not written"),
        (PermissionError(errno.EACCES, "Permission denied", "here"), UserError, "^here: Permission denied$"),
        (OSError(errno.EIO, "Input/output error"), UserError, r"/out: Input/output error$"),
        (UserError("said already"), UserError, "^said already$"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (SystemExit(3), SystemExit, "3"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_failure_leaves_what_was_there(
    error: BaseException, raised: type[BaseException], message: str | None, exists: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = sorted(make(out, *MODEL).rglob("*")) if exists else []

    def fail() -> None:
        with complete_folder(out, force=True) as partial:
            (partial / "half").touch()
            raise error

    with pytest.raises(raised, match=message):
        fail()
    assert sorted(tmp_path.rglob("*")) == ([out, *before] if exists else [])


@pytest.mark.parametrize(("force", "message"), [(False, "exists already"), (True, "not a model folder")])
def test_folder_that_came_to_be_meanwhile_is_kept(force: bool, message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message), complete_folder(out, force=force):
        make(out, "somebody's")
    assert sorted(tmp_path.rglob("*")) == [out, out / "somebody's"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Not a directory$"), complete_folder(tmp_path / "file" / "out"):
        pytest.fail("the body must not run")
