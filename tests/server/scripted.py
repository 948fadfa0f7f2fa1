"""A live server whose engine says what a test tells it to, in the tokens of a tokenizer with a model's own tags."""

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from gfxlm import load
from gfxlm.engine.grammar import Grammars
from gfxlm.engine.logprobs import TokenLogprob
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError
from gfxlm.server.registry import ModelSpec
from tests.server.conftest import LiveServer, serving

_HEAD = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or () %}{% set f = c.function %}"
)
_TAIL = (
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}%s{% endif %}"
)
_JSON_CALLS = (
    """{{ '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' + f.arguments | tojson + '}\\n</tool_call>' }}"""
)
_XML_CALLS = (
    "{{ '<tool_call>\\n<function=' + f.name + '>\\n' }}{% for k, v in f.arguments | items %}"
    "{{ '<parameter=' + k + '>\\n' + v + '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}"
)
_MISTRAL_CALLS = "{{ '[TOOL_CALLS]' + f.name + '[ARGS]' + f.arguments | tojson }}"
_LLAMA_CALLS = """{{ '<|python_tag|>{"name": "' + f.name + '", "parameters": ' + f.arguments | tojson + '}' }}"""
_NO_THINKING = "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
TEMPLATES = {
    "qwen3": _HEAD + _JSON_CALLS + _TAIL.replace("%s", _NO_THINKING),
    "opened": _HEAD + _JSON_CALLS + _TAIL.replace("%s", "{{ '<think>\\n' }}"),
    "hermes": _HEAD + _JSON_CALLS + _TAIL.replace("%s", ""),
    "qwen3_coder": _HEAD + _XML_CALLS + _TAIL.replace("%s", ""),
    "mistral": _HEAD + _MISTRAL_CALLS + _TAIL.replace("%s", ""),
    "llama": _HEAD + _LLAMA_CALLS + _TAIL.replace("%s", ""),
    "simple": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "none": None,
}
_TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
_SPECIAL = ["<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]


@cache
def tokenizer_of(style: str) -> Tokenizer:
    plain: Any = copy.deepcopy(load("builtin")[1]._tokenizer)
    if style != "none":
        plain.add_tokens(_TAGS if style in ("qwen3", "opened") else _TAGS[2:], special_tokens=False)
        plain.add_tokens(_SPECIAL, special_tokens=True)
        plain.chat_template = TEMPLATES[style]
    return Tokenizer(plain, plain.convert_tokens_to_ids("<|im_end|>") if style != "none" else None)


@dataclass
class Scripted:
    """An engine of scripts: each request says the next text, one token a step, or fails with the next error.

    A script that a request's grammar forbids fails the request.
    """

    tokenizer: Tokenizer
    texts: list[str | Exception] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    pause: float = 0.0
    fail_after: int = 0  # tokens
    cached: int = 0
    cache: Any = field(default_factory=lambda: SimpleNamespace(max_context=4096))
    free_positions = positions = 0

    def __post_init__(self) -> None:
        self._left: dict[Request, list[int]] = {}
        self.grammars = Grammars(self.tokenizer, len(self.tokenizer))

    @property
    def busy(self) -> bool:
        return bool(self._left)

    @property
    def running(self) -> int:
        return len(self._left)

    @property
    def prompt(self) -> str:
        """The latest request's."""
        return self.tokenizer.decode(self.asked[-1].prompt)

    @property
    def params(self) -> SamplingParams:
        """The latest request's."""
        return self.asked[-1].params

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        pass

    def add(self, prompt: Sequence[int], params: SamplingParams, **_: Any) -> Request:
        if params.grammar is not None:
            self.grammars.check(params.grammar)
        request = Request(list(prompt), params, started=time.monotonic(), cached=self.cached)
        self.asked.append(request)
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        tokens = [*self.tokenizer.encode(text, add_special_tokens=False), min(self.tokenizer.eos_token_ids)]
        self._check(tokens, params)
        self._left[request] = tokens
        return request

    def _check(self, tokens: list[int], params: SamplingParams) -> None:
        if params.grammar is None:
            return
        matcher = self.grammars.matcher(params.grammar)
        for i, token in enumerate(tokens):
            if not (int(self.grammars.masks([matcher])[0, token // 32]) >> (token % 32)) & 1:
                raise UserError(f"the grammar forbids {self.tokenizer.decode(tokens[i:])!r}")
            matcher.accept(token)

    def finish(self, request: Request) -> None:
        self._left.pop(request, None)
        self.finished.append(request)

    def step(self) -> list[Request]:
        time.sleep(self.pause)
        running = list(self._left)
        for request in running:
            token = self._left[request].pop(0)
            request.tokens.append(token)
            if request.params.top_logprobs is not None:
                request.logprob = TokenLogprob(token, -0.5, ((token, -0.5), (3, -2.0))[: request.params.top_logprobs])
            if len(request.tokens) == self.fail_after:
                request.finish_reason, request.error = "error", "the script broke"
                del self._left[request]
            elif not self._left[request] or len(request.tokens) == request.params.max_tokens:
                request.finish_reason = "length" if self._left[request] else "stop"
                del self._left[request]
        return running


@contextlib.contextmanager
def scripted(style: str, *texts: str | Exception, **options: Any) -> Iterator[tuple[LiveServer, Scripted]]:
    """A server of the model "scripted" with a chat template in the style of a family."""
    tokenizer = tokenizer_of(style)
    engine = Scripted(tokenizer, list(texts))
    config = SimpleNamespace(vocab_size=len(tokenizer), hidden_size=1)
    model = SimpleNamespace(config=config, generation_config={}, device=torch.device("cpu"))
    spec = ModelSpec(name="scripted", load=lambda: (model, tokenizer), make_engine=lambda *_: engine)  # type: ignore[return-value]
    with serving([spec], **{"max_tokens": 512, **options}) as live:
        yield live, engine
