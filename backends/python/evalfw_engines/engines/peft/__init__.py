"""transformers, PEFT and bitsandbytes on the CPU or an NVIDIA GPU, called as their own guides call them."""

from __future__ import annotations

import os

if os.environ.get("EVALFW_DEVICE") == "cpu":
    # Where there is a GPU, bitsandbytes loads its library for that and leaves out its kernels for the CPU. It looks for
    # one when it is imported.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from .device import Device  # noqa: E402
from .loading import PeftEngine  # noqa: E402


def open_engine() -> PeftEngine:
    return PeftEngine(Device.open())
