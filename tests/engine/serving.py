"""Requests over one engine, to their ends."""

from collections.abc import Sequence

from gfxlm.engine.engine import Engine
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request


def finish(engine: Engine) -> list[Request]:
    """Run all that wait and run to their ends; what `step` returned."""
    seen: list[Request] = []
    for _ in range(3000):
        if not engine.busy:
            return seen
        seen += engine.step()
    raise AssertionError("the engine does not come to an end")


def serve(engine: Engine, lengths: Sequence[tuple[int, int]]) -> list[Request]:
    """Requests that come while others run: of so many prompt tokens and answers of so many, every other one sampled."""
    requests = []
    for number, (length, most) in enumerate(lengths):
        prompt = [(number * 7 + i * i) % 4000 for i in range(length)]
        params = SamplingParams(max_tokens=most, temperature=0.8 if number % 2 else 0.0, seed=number)
        requests.append(engine.add(prompt, params))
        if number % 2:
            engine.step()
    finish(engine)
    assert not any(request.error for request in requests)
    return requests
