"""Trains an adapter with PEFT and torch's AdamW, saves it, and prints its evaluation loss for each batch
as JSON.

    train_adapter.py MODEL BATCHES SEED RANK OUTPUT [none|nf4]
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
import training

STEPS = 8


def train(model: Path, batches: Path, seed: int, rank: int, output: Path, quantization: str = "none") -> None:
    torch.set_num_threads(1)
    lines = data.read_batches(batches)
    adapted = adapters.create(main.load(model, quantization), seed, rank, alpha=3 * rank).train()
    settings = training.Settings(learning_rate=1e-2, batches_in_turn=len(lines), steps=STEPS)
    training.train(adapted, lines, settings)
    adapters.save(adapted, output)
    print(json.dumps(forward.evaluation_losses(adapted, lines)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case [model, batches, seed, rank, output, *quantization] if len(quantization) < 2:
            train(Path(model), Path(batches), int(seed), int(rank), Path(output), *quantization)
        case _:
            sys.exit(__doc__)
