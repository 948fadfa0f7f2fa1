"""Requests that come while others run, over one engine."""

from collections.abc import Sequence

from gfxlm.engine.engine import Engine
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request


def serve(engine: Engine, lengths: Sequence[tuple[int, int]]) -> list[Request]:
    """Run requests of so many prompt tokens and answers of so many, every other one sampled, to their ends."""
    requests = []
    for number, (length, most) in enumerate(lengths):
        prompt = [(number * 7 + i * i) % 4000 for i in range(length)]
        params = SamplingParams(max_tokens=most, temperature=0.8 if number % 2 else 0.0, seed=number)
        requests.append(engine.add(prompt, params))
        if number % 2:
            engine.step()
    while engine.busy:
        engine.step()
    assert not any(request.error for request in requests)
    return requests
