"""What is noted of one request."""

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class Sample:
    """What became of one request. All times in seconds after the first arrival.

    `arrival` is when it was due: a client that sends late does not make the server look fast.
    """

    arrival: float
    pieces: list[float] = field(default_factory=list)  # when each piece of text came
    end: float = math.nan
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None  # its kind, "HTTP 429"
    message: str = ""  # and what the server said
