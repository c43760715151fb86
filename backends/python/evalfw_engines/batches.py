"""Tokenised examples as the harness hands them out, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import Input

# The label of a position without a loss, as in transformers.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """A right-padded batch in the convention of transformers: `labels` are aligned with `input_ids`, and the model
    predicts `labels[t + 1]` at position `t`. Padding stands on the right and carries no label."""

    # [examples][slots], all rows of the same length.
    input_ids: list[list[int]]
    labels: list[list[int]]
    # Tokens that are not padding, for each example.
    lengths: list[int]

    @property
    def slots(self) -> int:
        return len(self.input_ids[0]) if self.input_ids else 0

    def trained_tokens(self) -> int:
        """Positions with a loss: nothing predicts the first token of a row."""
        return sum(label != IGNORE_INDEX for row in self.labels for label in row[1:])

    def attention_mask(self) -> list[list[int]]:
        return [[1] * length + [0] * (self.slots - length) for length in self.lengths]

    def check(self, vocab_size: int) -> str | None:
        """What is wrong with the shape, the padding, or an id."""
        slots = self.slots
        if slots == 0:
            return "input_ids is empty"
        if not len(self.input_ids) == len(self.labels) == len(self.lengths):
            return "input_ids, labels and lengths differ in the number of examples"
        for row, (ids, labels, length) in enumerate(zip(self.input_ids, self.labels, self.lengths)):
            if len(ids) != slots or len(labels) != slots:
                return f"example {row} does not have {slots} slots"
            if length > slots:
                return f"example {row} has a length of {length}, but only {slots} slots"
            for slot in range(length, slots):
                if labels[slot] != IGNORE_INDEX:
                    return f"example {row} has a label at slot {slot}, but its length is {length}: padding carries none"
            for token in ids:
                if token >= vocab_size:
                    return f"token id {token} is not below the vocabulary of {vocab_size}"
            for label in labels:
                if label != IGNORE_INDEX and not 0 <= label < vocab_size:
                    return f"label {label} is neither a token id nor {IGNORE_INDEX}"
        return None


def trained_tokens(batches: Iterable[Batch]) -> int:
    return sum(batch.trained_tokens() for batch in batches)


def read_batches(path: Path, vocab_size: int) -> list[Batch]:
    """Reads and checks a file of batches; an error names the file, the line and the field."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Input.file(path, error) from error
    # What ends the last line begins no other.
    if lines[-1] == "":
        lines.pop()
    batches = []
    for number, line in enumerate(lines, start=1):
        try:
            batch = parse(line)
            problem = batch.check(vocab_size)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise Input.file(path, f"line {number}: {problem}")
        batches.append(batch)
    return batches


def parse(line: str) -> Batch:
    """One line. A `ValueError` says what is wrong with it."""
    try:
        value = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("is not an object")
    for name in ("input_ids", "labels", "lengths"):
        if name not in value:
            raise ValueError(f"missing field `{name}`")
    input_ids, labels, lengths = value["input_ids"], value["labels"], value["lengths"]
    for name, rows in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(rows, list) or not all(_integers(row) for row in rows):
            raise ValueError(f"{name} is not a list of lists of whole numbers")
    if not _integers(lengths):
        raise ValueError("lengths is not a list of whole numbers")
    if any(number < 0 for row in [*input_ids, lengths] for number in row_numbers(row)):
        raise ValueError("input_ids and lengths hold a number below 0")
    return Batch(input_ids, labels, lengths)


def row_numbers(row: list[int] | int) -> list[int]:
    return row if isinstance(row, list) else [row]


def _integers(values: object) -> bool:
    # `type`, not `isinstance`: a JSON `true` is no number.
    return isinstance(values, list) and all(type(value) is int for value in values)
