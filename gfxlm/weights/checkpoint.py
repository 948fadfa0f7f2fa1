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
    "weights*.safetensors",
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
            found = open_safetensors(file)
            if twice := sorted(tensors.keys() & found.keys()):
                raise UserError(f"{folder}: {file.name} and another file both hold {twice[0]}; only one can be meant")
            tensors |= found
        return cls(folder, config, tensors)


def find_folder(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: the path itself, or a hub repository's snapshot (HF_HOME, HF_HUB_OFFLINE apply)."""
    name = str(path_or_repo)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, the home of nobody
        raise UserError(f"{name}: no such folder ({error})") from error
    if exists:
        raise UserError(f"{path}: not a folder; a model is a folder with config.json and *.safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: no such folder (and a hub name reads owner/model)")
    return _find_snapshot(name, revision)


def _find_snapshot(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    shown = name if revision is None else f"{name} ({revision})"
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{shown}: no such folder, not in the hub's cache or not whole there, and the hub cannot be reached"
        ) from error
    except Exception as error:  # which HTTP library the hub uses, and so what it raises, varies with its version
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{shown}: no such folder, and the hub says: {reason}") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{index}: no weight_map from tensors to files")
        if strange := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index}: {strange[0]!r} is outside the folder")
        files = [folder / name for name in sorted(set(names))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: missing, although {_INDEX} lists it")
        return files
    for pattern in ("model*.safetensors", "weights*.safetensors", "*.safetensors"):
        if files := sorted(folder.glob(pattern)):
            return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in folder.glob(pattern))
    hint = f", only {pickles[0]}, which can run code when it is read; convert it to safetensors" if pickles else ""
    raise UserError(f"{folder}: no *.safetensors in it{hint}")
