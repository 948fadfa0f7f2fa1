"""How the server was told to behave, by whoever started it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the command line says, for everybody who answers requests.

    Sizes are in bytes, times in seconds; None means that there is no limit. `sampling` holds defaults by the names of
    `SamplingParams`; they come before the model's generation_config.json and after what a request asks for.
    """

    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_size: int = 16 << 20
    max_concurrency: int = 32
    max_queue: int = 256
    request_timeout: float | None = None
    shutdown_timeout: float = 30.0
    keepalive_seconds: float = 15.0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int = 512
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    tool_parser: str | None = None
    log_prompts: bool = False

    @property
    def capacity(self) -> int:
        """Texts that may run or wait at the same time; a request for more of them is never answered."""
        return self.max_concurrency + self.max_queue
