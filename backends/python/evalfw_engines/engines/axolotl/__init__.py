"""axolotl on the CPU or an NVIDIA GPU: its own configuration, its own loader, its own trainer.

It rests on transformers, PEFT and bitsandbytes, in the releases that it pins. What it does not do itself, evaluation
and generation with the loaded model, is done as in the `peft` engine.
"""

from __future__ import annotations

import os

# Otherwise it mirrors all that is printed into a file in its output folder.
os.environ.setdefault("AXOLOTL_TEE_STDOUT", "0")

from .loading import AxolotlEngine, open_device


def open_engine() -> AxolotlEngine:
    return AxolotlEngine(open_device())
