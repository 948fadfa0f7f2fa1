"""Finding a model: local folders, the hub's cache, shards, indices, and everything that is not a model."""

import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from gfxlm.errors import UserError
from gfxlm.weights.checkpoint import Checkpoint, find_folder

INDEX = "model.safetensors.index.json"


def make_model(folder: Path, **files: list[str]) -> Path:
    """A folder with a config and safetensors files; `files` maps a file's stem to the tensors in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for stem, names in files.items():
        save_file({name: torch.full((2,), float(len(name))) for name in names}, folder / f"{stem}.safetensors")
    return folder


def refusal(open_it: Callable[[], object]) -> str:
    """The message of the UserError, which is one line."""
    with pytest.raises(UserError) as caught:
        open_it()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_plain_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model", model=["a", "bc"])
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (folder, str(folder), "~/model"):
        checkpoint = Checkpoint.open(path)
        assert checkpoint.folder == folder
        assert checkpoint.config == {"model_type": "llama"}
        assert set(checkpoint.tensors) == {"a", "bc"}
        assert torch.equal(checkpoint.tensors["bc"].read(), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    "stems", [("model-00001-of-00002", "model-00002-of-00002"), ("weights.00", "weights.01"), ("one", "two")]
)
def test_names_of_weight_files(stems: tuple[str, str], tmp_path: Path) -> None:
    folder = make_model(tmp_path, **{stems[0]: ["a"], stems[1]: ["b"]})
    assert set(Checkpoint.open(folder).tensors) == {"a", "b"}


def test_other_files_are_left_alone_beside_the_model(tmp_path: Path) -> None:
    folder = make_model(tmp_path, model=["a"], adapters=["lora"], weights=["old"])
    assert set(Checkpoint.open(folder).tensors) == {"a"}


def test_index_decides_which_files(tmp_path: Path) -> None:
    folder = make_model(tmp_path, **{"model-1": ["a"], "model-2": ["b"], "model": ["a", "stale"]})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert set(Checkpoint.open(folder).tensors) == {"a", "b"}


def test_index_that_lists_a_missing_shard(tmp_path: Path) -> None:
    folder = make_model(tmp_path, **{"model-1": ["a"]})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert refusal(lambda: Checkpoint.open(folder)) == (
        f"{folder / 'model-2.safetensors'}: missing, although {INDEX} lists it"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "no weight_map"),
        ('{"weight_map": {"a": 1, "b": "model.safetensors"}}', "no weight_map"),
        ('{"weight_map": {"a": ["model.safetensors"]}}', "no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "outside the folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "outside the folder"),
    ],
)
def test_damaged_index(content: str, message: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", model=["a"])
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (folder / INDEX).write_text(content)
    assert re.match(f"{re.escape(str(folder / INDEX))}: .*{message}", refusal(lambda: Checkpoint.open(folder)))


def test_tensor_in_two_files(tmp_path: Path) -> None:
    folder = make_model(tmp_path, **{"model": ["a"], "model-1": ["a", "b"]})
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder}: ")
    assert "model.safetensors and another file both hold a;" in message


def test_no_model_there(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(lambda: Checkpoint.open(empty)) == f"{empty}: not a model folder (no config.json in it)"
    bare = make_model(tmp_path / "bare")
    assert refusal(lambda: Checkpoint.open(bare)) == f"{bare}: no *.safetensors in it"
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert refusal(lambda: Checkpoint.open(file)).startswith(f"{file}: not a folder")
    for missing in (
        tmp_path / "nothing",
        "./nothing",
        "nothing",
        "a/b/c",
        "~nobody-has-this-name/model",
        "a\0b",
        "x" * 5000,
    ):
        assert re.match(
            f"{re.escape(str(missing)[:100])}.*: no such folder", refusal(lambda m=missing: Checkpoint.open(m))
        )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_named(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    (folder / name).write_bytes(b"")
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder}: no *.safetensors in it, only {name}")


def test_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert "no config.json" in refusal(lambda: Checkpoint.open(tmp_path))


COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "76543210fedcba9876543210fedcba9876543210"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache laid out by hand, with two revisions of owner/model, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    repo = tmp_path / "models--owner--model"
    make_model(repo / "snapshots" / COMMIT, model=["main"])
    make_model(repo / "snapshots" / OTHER, model=["other"])
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "refs" / "v2").write_text(OTHER)
    return tmp_path


@pytest.mark.parametrize(
    ("revision", "tensor"), [(None, "main"), ("main", "main"), ("v2", "other"), (OTHER, "other"), (COMMIT, "main")]
)
def test_snapshot_in_the_cache(revision: str | None, tensor: str, hub_cache: Path) -> None:
    checkpoint = Checkpoint.open("owner/model", revision)
    assert set(checkpoint.tensors) == {tensor}
    assert checkpoint.folder.is_relative_to(hub_cache)


@pytest.mark.parametrize(
    ("name", "revision"), [("owner/another", None), ("owner/model", "v3"), ("owner/model", "f" * 40)]
)
@pytest.mark.usefixtures("hub_cache")
def test_what_the_cache_lacks(name: str, revision: str | None) -> None:
    message = refusal(lambda: find_folder(name, revision))
    assert message.startswith(f"{name}{'' if revision is None else f' ({revision})'}: no such folder, not in the hub's")


@pytest.mark.parametrize("name", ["owner/mo del", "owner/--", "-owner/model", "owner/model.git"])
@pytest.mark.usefixtures("hub_cache")
def test_no_hub_name(name: str) -> None:
    assert refusal(lambda: find_folder(name)).startswith(f"{name}: no such folder, and the hub says: ")


def test_a_local_folder_wins_over_the_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(hub_cache / "owner" / "model", model=["local"])
    monkeypatch.chdir(hub_cache)
    assert set(Checkpoint.open("owner/model").tensors) == {"local"}
    assert folder.is_dir()


def test_whatever_can_be_opened_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find_folder("owner/model") == tmp_path
    wanted = ["config.json", INDEX, "model.safetensors", "model-00001-of-00002.safetensors", "weights.00.safetensors"]
    for file in (*wanted, "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        assert any(fnmatch(file, pattern) for pattern in asked)
    for file in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "README.md"):
        assert not any(fnmatch(file, pattern) for pattern in asked)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(), "OSError"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (Exception("connection reset\nby peer"), "connection reset"),
        (ValueError("\n\n"), "ValueError"),
    ],
)
def test_whatever_goes_wrong_while_downloading(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert refusal(lambda: find_folder("owner/model")).endswith(reason)
