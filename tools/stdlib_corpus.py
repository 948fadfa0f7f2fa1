"""What the built-in model reads: the Python source of CPython's standard library (PSF licence), and its tokenizer."""

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_ONE_IN = 28

# Character tables and other generated text: they cost many tokens and teach no Python.
GENERATED = ("encodings/", "pydoc_data/", "html/entities.py", "_sysconfigdata")
THIRD_PARTY = ("site-packages/",)
TEST_FOLDERS = {"test", "tests", "idle_test"}

# One piece: line breaks with the indentation that follows them, an identifier, one digit, punctuation, blanks.
PIECE = r"(?:\r?\n)+[ \t]*| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\s+"


@dataclass(frozen=True)
class Document:
    """One source file; `path` is relative to the library's root (CPython's `Lib`)."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        return not TEST_FOLDERS.isdisjoint(PurePosixPath(self.path).parts)

    @property
    def is_held_out(self) -> bool:
        """Chosen by the path alone, so that every run on every machine holds out the same files."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def read_corpus(source: Path) -> list[Document]:
    """Documents sorted by path, from a standard library folder or a tar archive holding CPython's `Lib`."""
    files = _files_of_folder(source) if source.is_dir() else _files_of_archive(source)
    documents = [Document(path, text) for path, data in files if (text := _readable(path, data))]
    if not documents:
        raise ValueError(f"corpus {source}: no Python source of a standard library in it")
    return sorted(documents, key=lambda document: document.path)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE in which a line break and its indentation are usually one token.

    A prompt opens with the end-of-text token: it is the start of a file, so its first line is in column 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[Tensor]:
    """Each document's token ids, the end-of-text token last."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    return [torch.tensor([*encoding.ids, end]) for encoding in encodings]


def shuffled_windows(documents: list[Tensor], window: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless (batch, window) token ids; each epoch packs the documents in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[i] for i in order])
        stream = stream[int(torch.randint(window, (), generator=generator)) :]
        windows = stream[: len(stream) // window * window].view(-1, window)
        windows = windows[torch.randperm(len(windows), generator=generator)]
        yield from windows[: len(windows) // batch * batch].split(batch)


def _files_of_folder(root: Path) -> Iterator[tuple[str, bytes]]:
    for file in root.rglob("*.py"):
        yield file.relative_to(root).as_posix(), file.read_bytes()


def _files_of_archive(archive: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            in_library = re.search(r"(?:^|/)Lib/(.+\.py)$", member.name)
            content = tar.extractfile(member) if in_library and member.isfile() else None
            if in_library and content:
                yield in_library[1], content.read()


def _readable(path: str, data: bytes) -> str:
    """The text of a file worth learning from, else an empty string."""
    if path.startswith(GENERATED) or any(part in path for part in THIRD_PARTY):
        return ""
    try:
        text = data.decode("utf-8").replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError:  # a few tests are in old encodings on purpose
        return ""
    return text and text + "\n"
