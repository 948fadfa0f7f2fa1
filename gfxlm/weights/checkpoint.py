"""A model folder: where it is, its config, and its tensors."""

from dataclasses import dataclass
from pathlib import Path

from gfxlm.errors import UserError
from gfxlm.weights.config import Config, read_config, read_json
from gfxlm.weights.safetensors_file import LazyTensor, open_safetensors

_INDEX = "model.safetensors.index.json"
_HUB_FILES = [
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model folder. Nothing but headers has been read."""

    folder: Path
    config: Config
    tensors: dict[str, LazyTensor]

    @classmethod
    def open(cls, path_or_repo: str | Path, revision: str | None = None) -> "Checkpoint":
        """Open a local folder, or a hub repository (from the cache, or downloaded into it).

        Raises UserError for a missing folder, a folder that is no model, a missing shard, or a corrupt file.
        """
        folder = find_folder(path_or_repo, revision)
        config = read_config(folder)
        tensors: dict[str, LazyTensor] = {}
        for file in _weight_files(folder):
            tensors |= open_safetensors(file)
        return cls(folder, config, tensors)


def find_folder(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: the path itself, or a hub repository's snapshot (HF_HOME, HF_HUB_OFFLINE apply)."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: not a folder; a model is a folder with config.json and *.safetensors")
    name = str(path_or_repo)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: no such folder (and a hub name reads owner/model)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise UserError(f"{name}: no such folder, not in the hub's cache, and the hub cannot be reached") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: no such folder, and the hub says: {reason}") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: missing, although {_INDEX} lists it")
        return files
    for pattern in ("model*.safetensors", "weights*.safetensors", "*.safetensors"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(f"{folder}: no *.safetensors in it")
