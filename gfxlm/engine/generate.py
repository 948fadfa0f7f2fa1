"""mlx-lm's generate, stream_generate and batch_generate."""

import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from gfxlm.device.memory import peak_bytes
from gfxlm.engine.budget import remaining
from gfxlm.engine.callbacks import LogitsProcessor, SamplerFunction, callbacks
from gfxlm.engine.drafters import drafter_for, remaining_with
from gfxlm.engine.engine import Engine
from gfxlm.engine.grammar import Grammars
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import FinishReason, Request
from gfxlm.engine.text import TextStream
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import KVOptions
from gfxlm.nn.cache import Cache

# What mlx-lm's functions take besides.
_MISSING = (
    "num_draft_tokens",
    "input_embeddings",
    "stream",
)

Prompt = str | Sequence[int] | Tensor


@dataclass
class GenerationResponse:
    """One step of `stream_generate`, with mlx-lm's fields.

    `text` is what became certain in this step and may be empty; `logprobs` is fp32 (V,). Rates are in tokens a second,
    `peak_memory` is in GB. `finish_reason` is set on the last one.
    """

    text: str
    token: int
    logprobs: Tensor | None
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: FinishReason | None = None


def _encode(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return [int(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]


def stream_generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_tokens: int = 256,
    draft_model: CausalLM | None = None,
    *,
    sampler: SamplerFunction | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: Cache | None = None,
    prefill_step_size: int = 2048,
    max_context: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    num_draft_tokens: int = 3,
    prompt_lookup_num_tokens: int = 0,
    cached_tokens: Sequence[int] = (),
    **sampling: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate from a prompt (text, or token ids), one response a token, as mlx-lm does.

    `max_tokens` -1 means until the context is full. `sampler` and `logits_processors` are mlx-lm's functions, over
    torch tensors; without them `sampling` holds fields of `SamplingParams` (temperature, top_p, stop, seed, …), whose
    defaults come from the model's generation_config.json. A `prompt_cache` is continued and kept up to date.
    `kv_bits` 8 or 4 quantises keys and values in groups of `kv_group_size` (32, 64, 128), if prompt and `max_tokens`
    may fill more than `quantized_kv_start` positions: then all of them, from the first one; a `prompt_cache` too.
    The context is as long as the request can need, at most `max_context`, and no longer than there is memory for.
    A `draft_model` of the same vocabulary guesses `num_draft_tokens` at a time, or what followed an earlier occurrence
    of the last tokens serves as a guess of `prompt_lookup_num_tokens`; the model then reads all of them at once, and
    the text stays the same. `cached_tokens`, those that a `prompt_cache` holds, make for better guesses.
    A `grammar` among the `sampling` makes the text one that it describes; while it is used, there are no drafts.
    With `max_kv_size`, keys and values of a longer text's first 4 tokens and its newest ones are kept, so many in all;
    drafts do not go with that.
    Raises UserError for bad arguments, and where the prompt, or a context that `max_context` asks for, does not fit
    into memory; GenerationError when the model's numbers are not finite.
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
    drafter = drafter_for(draft_model, num_draft_tokens, prompt_lookup_num_tokens)
    _refuse_unknown(sampling)
    params = SamplingParams.from_generation_config(
        model.generation_config, **sampling, max_tokens=max_tokens, logprobs=True
    )
    kv = KVOptions(max_kv_size, kv_bits, kv_group_size, quantized_kv_start)
    tokens = _encode(tokenizer, prompt)
    cached = 0 if prompt_cache is None else prompt_cache.lengths[0]
    context = context_for(model, [cached + len(tokens)], [max_tokens], max_context)
    lm = kv.model_for(model, context)
    budget = None
    if prompt_cache is not None:
        kv.prepare(prompt_cache, model, min(context, prompt_cache.max_context))
    else:
        budget = remaining_with(drafter, lm, prefill_step_size=prefill_step_size)
        context = budget.fit(context, least=len(tokens) + 1, exact=max_context is not None)
    engine = Engine(
        lm,
        eos_token_ids=tokenizer.eos_token_ids,
        max_context=context,
        prefill_step_size=prefill_step_size,
        cache=prompt_cache,
        sampler=callbacks(sampler, logits_processors),
        drafter=drafter,
        budget=budget,
        grammars=Grammars(tokenizer, lm.config.vocab_size) if params.grammar else None,
    )
    request = engine.add(tokens, params, cached_tokens=cached_tokens)
    try:
        yield from _responses(engine, request, tokenizer, prompt_progress_callback)
    finally:
        if request.queue:  # nobody wants the rest of an accepted run: the cache is to end where the text does
            engine.finish(request)


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Say of an option of mlx-lm's that it is missing here, and of any other that it is unknown."""
    known = {f.name for f in fields(SamplingParams)} - {"logprobs", "top_logprobs"}  # mlx-lm's responses have all
    for name in options.keys() - known:
        if name in _MISSING:
            raise UserError(f"{name}: not supported yet")
        raise TypeError(f"unexpected keyword argument {name!r}; known are {', '.join(sorted(known))}")


def context_for(model: CausalLM, prompts: Sequence[int], limits: Sequence[int], max_context: int | None = None) -> int:
    """Just as many positions as the longest request can need, at most what is wanted and what the model was made for.

    UserError for a `max_context` that the model was not made for.
    """
    limit = model.config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= limit:
        raise UserError(f"max_context must be from 1 to the model's {limit}, but is {max_context}")
    limit = max_context or limit
    return min(limit, max(limit if most < 0 else prompt + most for prompt, most in zip(prompts, limits, strict=True)))


def _responses(
    engine: Engine, request: Request, tokenizer: Tokenizer, progress: Callable[[int, int], None] | None
) -> Generator[GenerationResponse, None, None]:
    stream = TextStream(tokenizer, request.params.stop)
    start = time.perf_counter()
    first = start
    while request.finish_reason is None:
        produced = engine.step()
        if progress is not None and len(request.tokens) <= 1:
            progress(request.prefilled, len(request.prompt))
        if not produced:
            continue
        request.check()
        if len(request.tokens) == 1:
            first = time.perf_counter()
        token = request.tokens[-1]
        text, stopped = stream.add(token, last=request.finish_reason is not None)
        if stopped and request.finish_reason is None:
            engine.finish(request)
        now = time.perf_counter()
        yield GenerationResponse(
            text=text,
            token=token,
            logprobs=request.logprobs,
            from_draft=request.from_draft,
            prompt_tokens=len(request.prompt),
            prompt_tps=len(request.prompt) / (first - start),
            generation_tokens=len(request.tokens),
            generation_tps=len(request.tokens) / (now - first) if now > first else 0.0,
            peak_memory=peak_bytes(engine.model.device) / 1e9,
            finish_reason=request.finish_reason,
        )


def generate(model: CausalLM, tokenizer: Tokenizer, prompt: Prompt, verbose: bool = False, **kwargs: Any) -> str:
    """The whole answer to a prompt. `verbose` prints it as it comes, then mlx-lm's three lines of statistics.

    All else goes to `stream_generate`.
    """
    text, response = "", None
    if verbose:
        print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response is not None:
        print("\n" + "=" * 10)
        print(statistics(response))
    return text


def statistics(response: GenerationResponse) -> str:
    """mlx-lm's three lines about a finished generation."""
    return (
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB"
    )


@dataclass(kw_only=True)
class BatchStats:
    """Totals over a batch: tokens, steps, seconds, tokens a second, and peak memory in GB.

    A step that feeds any prompt counts as the prompts', even if other requests got tokens in it.
    """

    prompt_tokens: int = 0
    prompt_time: float = 0.0
    generation_tokens: int = 0
    generation_steps: int = 0
    decode_time: float = 0.0
    wall_time: float = 0.0
    peak_memory: float = 0.0

    @property
    def generation_time(self) -> float:
        """Seconds that did not go into prompts."""
        return max(0.0, self.wall_time - self.prompt_time)

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prompt_time if self.prompt_time else 0.0

    @property
    def generation_tps(self) -> float:
        """Generated tokens a second."""
        return self.generation_tokens / self.generation_time if self.generation_time else 0.0


@dataclass
class BatchResponse:
    """What `batch_generate` returns, in the order of the prompts. Optional parts are there if they were asked for."""

    texts: list[str]
    stats: BatchStats
    caches: list[Cache] | None = None
    token_ids: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None


def batch_generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    prompt_caches: Sequence[Cache] | None = None,
    max_tokens: int | Sequence[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    *,
    sampler: SamplerFunction | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    max_batch: int = 32,
    prefill_step_size: int = 2048,
    max_context: int | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    batch_invariant: bool = False,
    **sampling: Any,
) -> BatchResponse:
    """Answer many prompts (token ids) together, up to `max_batch` at a time.

    `prompt_caches`, one for each prompt and of one slot, hold what comes before it and are left as they are. `sampler`,
    `logits_processors` and all other keywords are those of `stream_generate`, for every prompt; keys and values are
    quantised for all of them if the longest may fill more than `quantized_kv_start` positions. `max_kv_size` is by
    default that of the smallest of the `prompt_caches` that have any.
    Where memory does not do for all of them at once, some wait.
    With `batch_invariant` an answer is, bit by bit, what it would be in other company, as long as `max_batch` and the
    context (`max_context`, or what the longest prompt needs) are the same.
    Raises GenerationError if any request fails.
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
    _refuse_unknown(sampling)
    params = SamplingParams.from_generation_config(model.generation_config, **sampling, logprobs=return_logprobs)
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    before = [0] * len(prompts) if prompt_caches is None else [cache.lengths[0] for cache in prompt_caches]
    if not prompts or len(limits) != len(prompts) or len(before) != len(prompts):
        raise UserError(
            f"{len(prompts)} prompts, {len(limits)} max_tokens and {len(before)} prompt_caches do not match"
        )
    lengths = [len(prompt) + cached for prompt, cached in zip(prompts, before, strict=True)]
    for cache in prompt_caches or ():
        model.check_cache(cache)
    if max_kv_size is None:
        max_kv_size = min((cache.ring.size for cache in prompt_caches or () if cache.ring is not None), default=None)
    kv = KVOptions(max_kv_size, kv_bits, kv_group_size, quantized_kv_start)
    context = context_for(model, lengths, limits, max_context)
    lm = kv.model_for(model, context)
    max_batch = max_batch if batch_invariant else min(max_batch, len(prompts))
    budget = remaining(lm, slots=max_batch, prefill_step_size=prefill_step_size)
    context = budget.fit(context, least=max(lengths) + 1, exact=max_context is not None)
    engine = Engine(
        lm,
        eos_token_ids=tokenizer.eos_token_ids,
        max_batch=max_batch,
        max_context=context,
        prefill_step_size=prefill_step_size,
        sampler=callbacks(sampler, logits_processors),
        batch_invariant=batch_invariant,
        budget=budget,
        grammars=Grammars(tokenizer, lm.config.vocab_size) if params.grammar else None,
    )
    prefixes = [None] * len(prompts) if prompt_caches is None else prompt_caches
    requests = [
        engine.add(prompt, replace(params, max_tokens=limit), prefix=prefix, keep_cache=return_prompt_caches)
        for prompt, limit, prefix in zip(prompts, limits, prefixes, strict=True)
    ]
    outputs = [_Output(TextStream(tokenizer, params.stop)) for _ in requests]
    stats = _run_batch(engine, dict(zip(requests, outputs, strict=True)), verbose)
    return BatchResponse(
        texts=[output.text for output in outputs],
        stats=stats,
        caches=[request.cache for request in requests if request.cache] if return_prompt_caches else None,
        token_ids=[output.token_ids for output in outputs] if return_token_ids else None,
        logprobs=[output.logprobs for output in outputs] if return_logprobs else None,
    )


@dataclass
class _Output:
    """What a batch collects of one request. The end-of-text token is no part of it."""

    stream: TextStream
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def _run_batch(engine: Engine, outputs: dict[Request, _Output], verbose: bool) -> BatchStats:
    stats = BatchStats(prompt_tokens=sum(len(request.prompt) for request in outputs))
    begin = time.perf_counter()
    while engine.busy:
        prefilling, start = engine.prefilling, time.perf_counter()
        produced = engine.step()
        seconds = time.perf_counter() - start
        stats.prompt_time += seconds if prefilling else 0.0
        stats.decode_time += 0.0 if prefilling else seconds
        stats.generation_steps += not prefilling
        stats.generation_tokens += len(produced)
        for request in produced:
            _collect(engine, request, outputs[request])
        if verbose:
            done = sum(request.finish_reason is not None for request in outputs)
            print(f"\r[batch_generate] Finished {done}/{len(outputs)}", end="", file=sys.stderr, flush=True)
    stats.wall_time = time.perf_counter() - begin
    stats.peak_memory = peak_bytes(engine.model.device) / 1e9
    if verbose:
        print(
            f"\n[batch_generate] Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tps:.3f} tokens-per-sec\n"
            f"[batch_generate] Generation: {stats.generation_tokens} tokens, "
            f"{stats.generation_tps:.3f} tokens-per-sec\n"
            f"[batch_generate] Peak memory: {stats.peak_memory:.3f} GB",
            file=sys.stderr,
        )
    return stats


def _collect(engine: Engine, request: Request, output: _Output) -> None:
    request.check()
    token = request.tokens[-1]
    text, stopped = output.stream.add(token, last=request.finish_reason is not None)
    output.text += text
    if token not in engine.eos_token_ids:
        output.token_ids.append(token)
        if request.logprobs is not None:
            output.logprobs.append(float(request.logprobs[token]))
    if stopped and request.finish_reason is None:
        engine.finish(request)
