"""What the config of every family has, and how a config is checked."""

import math
from dataclasses import MISSING, Field, dataclass, fields
from types import UnionType
from typing import Any, Self, get_args, get_origin

from gfxlm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields that every family has. A family adds its own."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    rms_norm_eps: float
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None
    hidden_act: str = "silu"

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Take the known fields of a config in transformers 4's spelling, where null is the same as absent.

        Raises UserError naming the fields that are missing, of the wrong type, or that no model can have.
        """
        known = {field.name: field for field in fields(cls)}
        given = {name: config[name] for name in known if config.get(name) is not None}
        missing = [name for name, field in known.items() if name not in given and _has_no_default(field)]
        if missing:
            raise UserError(f"config.json: {cls.__name__} needs {', '.join(missing)}")
        for name, value in given.items():
            require(_fits(value, known[name].type), f"{name} cannot be {value!r}")
        return cls(**given)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float):
                require(0 <= value < math.inf, f"{name} cannot be {value}")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rope_theta"):
            require(getattr(self, name) > 0, f"{name} cannot be 0")
        require(self.max_position_embeddings > 0, "max_position_embeddings cannot be 0")
        require(self.head_size > 0, f"hidden_size {self.hidden_size} is too small for its attention heads")
        heads, kv_heads = self.num_attention_heads, self.kv_heads
        require(heads % kv_heads == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        require(self.hidden_act in ("silu", "swish"), f"hidden_act {self.hidden_act!r} is not supported, only 'silu'")

    @property
    def kv_heads(self) -> int:
        """Key and value heads, as many as query heads where the config names none."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def require(condition: bool, complaint: str) -> None:
    """Raise a UserError about the config unless the condition holds."""
    if not condition:
        raise UserError(f"config.json: {complaint}")


def _has_no_default(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _fits(value: object, annotation: Any) -> bool:
    """Whether a JSON value is of a field's type; an integer is also a float, and a boolean is no number."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is UnionType:
        return any(_fits(value, argument) for argument in arguments)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict)
    return type(value) is annotation or (annotation is float and type(value) is int)
