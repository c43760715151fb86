"""Loads an adapter with PEFT and prints its evaluation loss for each batch as JSON.

    check_adapter.py ADAPTER MODEL BATCHES [none|nf4]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import adapters
import data
import forward
import main
import torch


def check(adapter: Path, model: Path, batches: Path, quantization: str = "none") -> None:
    torch.set_num_threads(1)
    adapted = adapters.attach(main.load(model, quantization), adapter)
    print(json.dumps(forward.evaluation_losses(adapted, data.read_batches(batches))))


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    check(*(Path(argument) for argument in sys.argv[1:4]), *sys.argv[4:])
