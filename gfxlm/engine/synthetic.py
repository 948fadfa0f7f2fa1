"""A model of random weights with a tokenizer to go with it, to serve a model's speed before it is downloaded."""

from collections.abc import Callable

import torch

from gfxlm.device.memory import parsed_bytes
from gfxlm.device.select import pick_device
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.models.base import CausalLM
from gfxlm.models.load import load_model
from gfxlm.models.synthetic import synthetic_checkpoint

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def load_synthetic(
    name_or_path: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory_limit: str | int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[CausalLM, Tokenizer]:
    """Random 4-bit weights in the shapes of a published model, or of a folder's config.json.

    The arguments mean what `gfxlm.engine.load.load`'s do. Raises UserError for an unknown name.
    """
    place = pick_device(device)
    checkpoint = synthetic_checkpoint(name_or_path, place)
    total, done = sum(tensor.nbytes for tensor in checkpoint.tensors.values()), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    model = load_model(checkpoint, dtype=dtype, device=place, progress=count)
    model.memory_limit = None if memory_limit is None else parsed_bytes(memory_limit, place)
    return model, stand_in_tokenizer(model.config.vocab_size)


def stand_in_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens, at least 256: text becomes bytes; other tokens are their number as a word.

    No token ends a text: what random weights write has the length that is asked for.
    """
    # transformers takes seconds to import.
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    space = "Ġ"  # how a byte-level vocabulary writes it
    symbols = [*sorted(ByteLevel.alphabet()), *(f"{space}{number}" for number in range(256, vocab_size))]
    backend = Backend(BPE({symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=_CHAT_TEMPLATE))
