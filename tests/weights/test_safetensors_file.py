"""Our reader against safetensors' and MLX's own writers, and against files that are damaged in every way."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.weights.safetensors_file import LazyTensor, open_safetensors, stacked

ONE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def file_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def example_tensors() -> dict[str, Tensor]:
    integers = [getattr(torch, f"{sign}int{width}") for sign in ("u", "") for width in (8, 16, 32, 64)]
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
    out = {str(dtype): torch.randint(0, 100, (3, 5)).to(dtype) for dtype in integers}
    out |= {str(dtype): torch.randn(3, 5).to(dtype) for dtype in floats}
    return out | {
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "not finite": torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]),
    }


def test_what_safetensors_writes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    written = example_tensors()
    save_file(written, file, metadata={"format": "pt"})
    ours, theirs = open_safetensors(file), load_file(file)
    assert set(ours) == set(theirs)
    for name, lazy in ours.items():
        tensor = lazy.read()
        assert (tensor.shape, tensor.dtype) == (lazy.shape, lazy.dtype) == (theirs[name].shape, theirs[name].dtype)
        assert torch.equal(bits(tensor), bits(theirs[name]))
        assert lazy.nbytes == tensor.nbytes


def test_what_mlx_writes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    w_q, scales, biases = mx.quantize(mx.random.normal((8, 64)).astype(mx.bfloat16))
    mx.save_safetensors(str(file), {"w": w_q, "scales": scales, "biases": biases}, metadata={"format": "mlx"})
    ours, theirs = open_safetensors(file), load_file(file)
    for name, dtype in (("w", torch.uint32), ("scales", torch.bfloat16), ("biases", torch.bfloat16)):
        assert ours[name].dtype == dtype
        assert torch.equal(bits(ours[name].read()), bits(theirs[name]))


def test_tensors_are_read_when_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, file)
    lazy = open_safetensors(file)["a"]
    save_file({"a": torch.full((4,), 2.0)}, file)
    assert torch.equal(lazy.read(), torch.full((4,), 2.0))


def test_map_and_stack() -> None:
    rows = [LazyTensor((2,), torch.float32, lambda n=n: torch.full((2,), float(n))) for n in range(3)]
    stack = stacked(rows)
    assert (stack.shape, stack.dtype, stack.nbytes) == ((3, 2), torch.float32, 24)
    assert torch.equal(stack.read(), torch.tensor([[0.0, 0], [1, 1], [2, 2]]))
    turned = stack.map(lambda t: t.mT + 1, (2, 3))
    assert turned.shape == (2, 3)
    assert torch.equal(turned.read(), stack.read().mT + 1)


def with_fields(**fields: Any) -> bytes:
    return file_bytes({"w": ONE | fields}, bytes(24))


DAMAGED: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "not a safetensors file, or cut off in its header"),
    "half a length": (b"\x10\0\0", "not a safetensors file, or cut off in its header"),
    "length beyond the file": (file_bytes({"w": ONE})[:40], "not a safetensors file, or cut off in its header"),
    "absurd length": (b"\xff" * 8 + b"{}", "not a safetensors file, or cut off in its header"),
    "length zero": (bytes(16), "not a safetensors file, or cut off in its header"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "not a safetensors file"),
    "not JSON": (file_bytes(b"{'w': 1}"), "header is not JSON"),
    "not UTF-8": (file_bytes(b'{"\xff\xfe": {}}'), "header is not JSON"),
    "too deep": (file_bytes(b"[" * 100_000 + b"]" * 100_000), "header is not JSON"),
    "too many digits": (file_bytes(b'{"w": ' + b"9" * 5000 + b"}"), "header is not JSON"),
    "a list": (file_bytes([1, 2]), "header is no JSON object"),
    "a number": (file_bytes(12345), "header is no JSON object"),
    "null": (file_bytes(None), "header is no JSON object"),
    "entry is a list": (file_bytes({"w": []}), "tensor w"),
    "entry is null": (file_bytes({"w": None}), "tensor w"),
    "no dtype": (file_bytes({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "tensor w"),
    "no shape": (file_bytes({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "tensor w"),
    "no offsets": (file_bytes({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)), "tensor w"),
    "name is not printable": (file_bytes({"w\n\ud800": ONE}, bytes(24)), r"'w\\n\\ud800'"),
    "unknown dtype": (with_fields(dtype="F4_E9"), "tensor w has the unknown type 'F4_E9'"),
    "dtype is a list": (with_fields(dtype=["F32"]), "tensor w"),
    "negative shape": (with_fields(shape=[-2, -3]), r"tensor w of shape \(-2, -3\)"),
    "shape is a string": (with_fields(shape="23"), "tensor w"),
    "shape is a number": (with_fields(shape=6), "tensor w"),
    "shape of floats": (with_fields(shape=[2.0, 3.0]), "tensor w"),
    "shape of strings": (with_fields(shape=["2", "3"]), "tensor w"),
    "shape of booleans": (file_bytes({"w": ONE | {"shape": [True, 6]}}, bytes(24)), "tensor w"),
    "infinite shape": (file_bytes(b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}'), "tensor w"),
    "shape larger than its bytes": (with_fields(shape=[2, 4]), r"tensor w of shape \(2, 4\) .* 24 bytes"),
    "shape smaller than its bytes": (with_fields(shape=[2, 2]), r"tensor w of shape \(2, 2\) .* 24 bytes"),
    "no tensor can be that large": (with_fields(shape=[0, 1 << 70], data_offsets=[0, 0]), "tensor w of shape"),
    "offsets swapped": (with_fields(data_offsets=[24, 0]), "tensor w of shape"),
    "offset negative": (with_fields(data_offsets=[-24, 0]), "tensor w of shape"),
    "one offset": (with_fields(data_offsets=[24]), "tensor w"),
    "three offsets": (with_fields(data_offsets=[0, 24, 48]), "tensor w"),
    "offsets of floats": (with_fields(data_offsets=[0.5, 24.5]), "tensor w"),
    "truncated": (file_bytes({"w": ONE}, bytes(23)), "truncated: tensor w ends at byte"),
    "overlapping": (
        file_bytes({"w": ONE, "v": {"dtype": "F32", "shape": [6], "data_offsets": [20, 44]}}, bytes(44)),
        "tensors w and v overlap",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_a_user_error_that_names_the_file(kind: str, tmp_path: Path) -> None:
    content, message = DAMAGED[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_safetensors(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_missing_file_and_folder_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.safetensors: No such file"):
        open_safetensors(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="Is a directory"):
        open_safetensors(tmp_path)


def test_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(file_bytes({"w": ONE}, bytes(24)))
    lazy = open_safetensors(file)["w"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: the file became shorter while it was read"):
        lazy.read()
    file.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: No such file"):
        lazy.read()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
FIELD = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"])


def read_or_refuse(file: Path, content: bytes) -> None:
    """The file either reads, in the shapes it declares, or is refused with one line that names it."""
    file.write_bytes(content)
    refusal = f"{file}: "
    try:
        assert all(lazy.read().shape == lazy.shape for lazy in open_safetensors(file).values())
    except UserError as error:
        refusal = str(error)
    assert refusal.startswith(f"{file}: ")
    assert len(refusal.splitlines()) == 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 150), removed=st.integers(0, 4), inserted=st.binary(max_size=4))
def test_any_bytes(place: int, removed: int, inserted: bytes, tmp_path: Path) -> None:
    whole = file_bytes({"__metadata__": {"format": "mlx"}, "w": ONE}, bytes(24))
    read_or_refuse(tmp_path / "model.safetensors", whole[:place] + inserted + whole[place + removed :])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=FIELD, value=JSON | st.lists(st.integers(-1, 30), max_size=3), name=st.text(max_size=3))
def test_any_json(field: str, value: object, name: str, tmp_path: Path) -> None:
    header = {name: ONE | {field: value}, "v": {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]}}
    read_or_refuse(tmp_path / "model.safetensors", file_bytes(header, bytes(28)))
