#!/usr/bin/env python3
"""Makes golden.json: what implementations of their own say of some decisions.

Weighted sums and the reversal of ranks by min-max scaling come from pymcdm, rank acceptabilities from a million draws of
numpy, break-even weights from a search over all weights. In a fresh environment:

    python3.11 -m venv venv && venv/bin/pip install -r requirements.txt && venv/bin/python make.py
"""

import json
from pathlib import Path

import numpy as np
from pymcdm.methods import WSM
from pymcdm.normalizations import minmax_normalization

DRAWS = 1_000_000

CASES = {
    "by_hand": {"weights": [25, 25, 20, 20, 10], "scores": [[9, 9, 8, 9, 8], [4, 6, 6, 9, 10]]},
    "three": {"weights": [25, 25, 20, 20, 10], "scores": [[6.8, 10, 5.5, 10, 10], [7.9, 9.2, 3.1, 10, 8.3], [3.0, 4.5, 9.4, 7.5, 10]]},
    "close": {"weights": [50, 30, 20], "scores": [[7.0, 5.0, 4.0], [6.0, 5.9, 5.0], [5.5, 6.4, 5.4], [2.0, 9.5, 6.0]]},
}


def totals(scores, weights):
    """pymcdm wants shares; without scaling its weighted sum is that of the scores as they are."""
    method = WSM(normalization_function=lambda column, cost: column)
    return method(np.array(scores, float), np.array(weights) / 100, np.ones(len(weights))).tolist()


def ranks(scores, weights):
    values = weights @ scores.T
    order = (values[:, None, :] > values[:, :, None]).sum(axis=2)
    return [[float((order[:, engine] == rank).mean()) for rank in range(len(scores))] for engine in range(len(scores))]


def smaa(scores, weights, factor, rng):
    scores = np.array(scores, float)
    free = rng.dirichlet(np.ones(len(weights)), DRAWS)
    first = (free @ scores.T).argmax(axis=1)
    change = rng.uniform(1, factor, (DRAWS, len(weights)))
    change = np.where(rng.random(change.shape) < 0.5, change, 1 / change)
    around = np.array(weights) * change
    around /= around.sum(axis=1, keepdims=True)
    return {
        "ranks": ranks(scores, around),
        "first_with_any_weights": [float((first == engine).mean()) for engine in range(len(scores))],
        "central_weights": [
            (100 * free[first == engine].mean(axis=0)).tolist() if (first == engine).any() else None
            for engine in range(len(scores))
        ],
    }


def break_even(scores, weights):
    """The nearest weights, in steps of 0.001 %, at which somebody else is first."""
    scores, weights = np.array(scores, float), np.array(weights, float)
    leader = int((scores @ weights).argmax())
    found = []
    for criterion, stated in enumerate(weights):
        grid = np.arange(0, 100_001) / 1000
        rest = (100 - grid) / (100 - stated)
        moved = np.outer(rest, weights)
        moved[:, criterion] = grid
        other = (moved @ scores.T).argmax(axis=1) != leader
        below, above = grid[other & (grid < stated)], grid[other & (grid > stated)]
        found.append([float(below.max()) if below.size else None, float(above.min()) if above.size else None])
    return {"first": leader, "levels": found}


def reversal():
    """An alternative that is worst in all turns the order of the first two where scores are scaled to those present."""
    weights = np.array([0.5, 0.5])
    raw = np.array([[9.0, 6.0], [6.5, 8.0], [5.0, 9.5]])
    worst = np.array([[1.0, 5.9]])
    method = WSM(normalization_function=minmax_normalization)
    kinds = np.ones(2)
    return {
        "scores": raw.tolist(),
        "irrelevant": worst[0].tolist(),
        "scaled_before": method(raw, weights, kinds).tolist(),
        "scaled_after": method(np.vstack([raw, worst]), weights, kinds)[:3].tolist(),
    }


def main():
    rng = np.random.default_rng(1)
    golden = {"factor": 2.0, "cases": {}, "reversal": reversal()}
    for name, case in CASES.items():
        golden["cases"][name] = {
            **case,
            "totals": totals(case["scores"], case["weights"]),
            "smaa": smaa(case["scores"], case["weights"], golden["factor"], rng),
            "break_even": break_even(case["scores"], case["weights"]),
        }
    text = json.dumps(golden, indent=1) + "\n"
    Path(__file__).with_name("golden.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
