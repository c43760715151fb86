"""Compares two folders of golden files within float tolerance: `compare.py RECORDED FOUND`.

Another processor adds up in another order. Measured between AVX-512, AVX2 and neither, logits and
gradients differ by some 1e-6 of the largest value, and an adapter after 20 steps by up to 5e-4.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

TOLERANCE = 2e-5
# Training adds up the noise; AdamW's first steps are as large for a tiny gradient as for any other.
LOOSER = {"curves.json": 1e-3, "dropout.json": 1e-3, "losses.json": 1e-3, "trained_adapter": 5e-3}
# Distances between two logits: the noise of both over their small difference.
LOOSER["greedy.json"] = 1e-3


def main(recorded: Path, found: Path) -> None:
    problems = []
    names = {path.relative_to(root) for root in (recorded, found) for path in root.rglob("*") if path.is_file()}
    for name in sorted(names):
        missing = [str(root) for root in (recorded, found) if not (root / name).is_file()]
        if missing:
            problems.append(f"{name} is not in {missing[0]}")
        else:
            problems += [f"{name}: {problem}" for problem in compare(recorded / name, found / name)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(1)
    print(f"{len(names)} golden files agree")


def compare(recorded: Path, found: Path) -> Iterator[str]:
    parts = {recorded.name, recorded.parent.name}
    tolerance = max((limit for part, limit in LOOSER.items() if part in parts), default=TOLERANCE)
    if recorded.read_bytes() == found.read_bytes():
        return
    match recorded.suffix:
        case ".safetensors":
            yield from _tensors(load_file(recorded), load_file(found), tolerance)
        case ".json":
            yield from _values("", json.loads(recorded.read_text()), json.loads(found.read_text()), tolerance)
        case _:
            yield "differs"


def _tensors(recorded: dict[str, torch.Tensor], found: dict[str, torch.Tensor], tolerance: float) -> Iterator[str]:
    if recorded.keys() != found.keys():
        yield f"other tensors: {sorted(recorded.keys() ^ found.keys())}"
        return
    for name, expected in recorded.items():
        tensor = found[name]
        if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
            yield f"{name}: another type or shape"
        elif not expected.is_floating_point():
            if not torch.equal(tensor, expected):
                yield f"{name}: {int((tensor != expected).sum())} of {expected.numel()} values differ"
        else:
            difference = float((tensor.double() - expected.double()).abs().max())
            largest = float(expected.double().abs().max())
            # Written so that a NaN, too, is a difference.
            if not difference <= tolerance * largest:
                yield f"{name}: differs by {difference:.3g} where the largest value is {largest:.3g}"


def _values(path: str, recorded: object, found: object, tolerance: float) -> Iterator[str]:
    if isinstance(recorded, float) and isinstance(found, float):
        if not math.isclose(recorded, found, rel_tol=tolerance, abs_tol=1e-12):
            yield f"{path}: {recorded} became {found}"
    elif isinstance(recorded, dict) and isinstance(found, dict) and recorded.keys() == found.keys():
        for key, value in recorded.items():
            yield from _values(f"{path}/{key}", value, found[key], tolerance)
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for i, (a, b) in enumerate(zip(recorded, found)):
            yield from _values(f"{path}/{i}", a, b, tolerance)
    elif type(recorded) is not type(found) or recorded != found:
        yield f"{path}: {recorded} became {found}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
