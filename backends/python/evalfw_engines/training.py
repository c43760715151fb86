"""The optimizer's settings, as the harness sends them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .errors import Protocol


@dataclass(frozen=True)
class TrainingConfig:
    """AdamW with the names of PyTorch."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    # Gradients are scaled down to this L2 norm, as by `torch.nn.utils.clip_grad_norm_`.
    max_grad_norm: float | None
    # Keep only each block's input and compute the block again in the backward pass.
    gradient_checkpointing: bool
    # With checkpointing, memory for activations that an engine may keep instead of computing them again. An engine
    # that cannot keeps none.
    kept_activation_bytes: int = 0

    @classmethod
    def from_json(cls, value: object) -> TrainingConfig:
        """Reads and checks the settings; an error names the field."""
        if not isinstance(value, dict):
            raise Protocol("training is not an object")
        given = {"kept_activation_bytes": 0, "max_grad_norm": None, **value}
        read = {}
        for field in fields(cls):
            if field.name not in given:
                raise Protocol(f"training: missing field `{field.name}`")
            read[field.name] = _typed(field.name, given[field.name])
        config = cls(**read)
        config._check()
        return config

    def _check(self) -> None:
        def finite(value: float, holds: bool) -> bool:
            return math.isfinite(value) and holds

        checks = [
            ("learning_rate", finite(self.learning_rate, self.learning_rate >= 0), "at least 0"),
            ("beta1", 0 <= self.beta1 < 1, "in [0, 1)"),
            ("beta2", 0 <= self.beta2 < 1, "in [0, 1)"),
            ("epsilon", finite(self.epsilon, self.epsilon > 0), "above 0"),
            ("weight_decay", finite(self.weight_decay, self.weight_decay >= 0), "at least 0"),
        ]
        if self.max_grad_norm is not None:
            checks.append(("max_grad_norm", finite(self.max_grad_norm, self.max_grad_norm > 0), "above 0"))
        for name, holds, wanted in checks:
            if not holds:
                raise Protocol(f"training: {name} is {getattr(self, name)}, but must be {wanted}")


def _typed(name: str, value: object) -> object:
    """A value of the field's type."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "gradient_checkpointing":
        if isinstance(value, bool):
            return value
        raise Protocol(f"training: {name} is {value!r}, but must be a boolean")
    if name == "kept_activation_bytes":
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise Protocol(f"training: {name} is {value!r}, but must be a count of bytes")
    if name == "max_grad_norm" and value is None:
        return None
    if not is_number:
        raise Protocol(f"training: {name} is {value!r}, but must be a number")
    return float(value)
