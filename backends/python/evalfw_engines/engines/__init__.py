"""The engines by their names on the command line. Nothing of a framework is imported here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from ..engine import Engine
from ..errors import Unavailable


@dataclass(frozen=True)
class Entry:
    module: str
    # What has to be installed, by the names of the distributions; the first one is the framework.
    packages: tuple[str, ...]
    # In `requirements/`.
    requirements: str


ENGINES = {
    "peft": Entry(
        "peft", ("peft", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "numpy"), "peft.txt"
    ),
    "mlx-lm": Entry("mlx_lm", ("mlx-lm", "mlx", "transformers", "safetensors", "numpy"), "mlx-lm.txt"),
    "axolotl": Entry(
        "axolotl", ("axolotl", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy"), "axolotl.txt"
    ),
}


def open_engine(name: str) -> Engine:
    """Imports the engine's module and opens its device."""
    entry = ENGINES[name]
    advice = f"`evalfw engines install --force {name}` makes its environment (requirements/{entry.requirements})"
    try:
        module = importlib.import_module(f"{__name__}.{entry.module}")
        return module.open_engine()
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported: {error}", advice) from error
