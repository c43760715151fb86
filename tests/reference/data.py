"""Prompts and batches. A batch is one JSON line as evalfw writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models import ModelSpec

IGNORE_INDEX = -100
PADDING = 0
PROMPT_LENGTHS = (1, 7, 29)
SLOTS = (13, 17, 19, 11, 23, 7, 14, 21)
# Tokens that answers are made of, each with one successor, so that there is something to learn.
ALPHABET = 24


@dataclass(frozen=True)
class Batch:
    input_ids: list[list[int]]
    labels: list[list[int]]
    lengths: list[int]

    def trained_tokens(self) -> int:
        """Positions with a loss: nothing predicts the first token of a row."""
        return sum(label != IGNORE_INDEX for row in self.labels for label in row[1:])

    def inputs(self) -> dict[str, torch.Tensor]:
        slots = torch.arange(len(self.input_ids[0]))
        lengths = torch.tensor(self.lengths)
        return {
            "input_ids": torch.tensor(self.input_ids),
            "attention_mask": (slots[None, :] < lengths[:, None]).long(),
            "labels": torch.tensor(self.labels),
        }


def prompts(spec: ModelSpec) -> list[list[int]]:
    rng = spec.rng("prompts")
    return [rng.integers(0, spec.vocab_size, size=length).tolist() for length in PROMPT_LENGTHS]


def batches(spec: ModelSpec) -> list[Batch]:
    rng = spec.rng("batches")
    successor = _successors(spec, rng)
    made = []
    for number, slots in enumerate(SLOTS):
        shorter = slots - int(rng.integers(1, 5))
        lengths = [slots, shorter] if number % 2 == 0 else [shorter, slots]
        rows = [_row(spec, successor, slots, length, rng) for length in lengths]
        made.append(Batch([ids for ids, _ in rows], [labels for _, labels in rows], lengths))
    _add_corner_cases(made)
    return made


def _successors(spec: ModelSpec, rng: np.random.Generator) -> dict[int, int]:
    """Each token of the alphabet is followed by one other."""
    cycle = rng.choice(spec.vocab_size, size=ALPHABET, replace=False).tolist()
    return dict(zip(cycle, cycle[1:] + cycle[:1]))


def _row(
    spec: ModelSpec, successor: dict[int, int], slots: int, length: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    question = int(rng.integers(1, max(2, length // 3)))
    ids = rng.integers(0, spec.vocab_size, size=question).tolist()
    token = int(rng.choice(list(successor)))
    while len(ids) < length:
        ids.append(token)
        token = successor[token]
        if rng.random() < 0.1:
            token = int(rng.choice(list(successor)))
    labels = [IGNORE_INDEX] * question + ids[question:]
    padding = slots - length
    return ids + [PADDING] * padding, labels + [IGNORE_INDEX] * padding


def _add_corner_cases(made: list[Batch]) -> None:
    # A hole within an answer, a row without any answer, a label on a first token.
    hole = made[4].labels[0]
    hole[12:15] = [IGNORE_INDEX] * 3
    made[5].labels[0][:] = [IGNORE_INDEX] * len(made[5].labels[0])
    made[6].labels[0][0] = made[6].input_ids[0][0]


def write_batches(path: Path, made: list[Batch]) -> None:
    lines = [json.dumps(vars(batch), separators=(",", ":")) for batch in made]
    path.write_text("".join(line + "\n" for line in lines))


def read_batches(path: Path) -> list[Batch]:
    return [Batch(**json.loads(line)) for line in path.read_text().splitlines()]
