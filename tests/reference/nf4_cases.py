"""Matrices for which NF4 is recorded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from nf4_rules import BLOCK

f32 = np.float32
bf16, f16 = torch.bfloat16, torch.float16


def cases(levels: np.ndarray) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(20240)

    def normal(rows: int, columns: int, scale: float = 0.05) -> np.ndarray:
        return (scale * rng.standard_normal((rows, columns))).astype(f32)

    def wide(rows: int) -> np.ndarray:
        """Rows over many decades: their absmax values use all of the dynamic map."""
        return (normal(rows, BLOCK) * 10.0 ** rng.uniform(-6, 1, (rows, 1))).astype(f32)

    zero_block = normal(8, BLOCK)
    zero_block[3] = 0
    zero_tail = normal(3, 50)
    zero_tail.reshape(-1)[128:] = 0
    outliers = normal(16, 80)
    outliers.reshape(-1)[rng.choice(outliers.size, 12, replace=False)] *= 60
    made = {
        "one-f32": normal(1, 1),
        "small-f32": normal(3, 5),
        "rows-f32": normal(7, 64),
        "rows-bf16": (normal(16, 64), bf16),
        "odd-f32": normal(33, 65),
        "odd-f16": (normal(33, 65), f16),
        "odd-bf16": (normal(29, 37), bf16),
        "tail-f32": normal(50, 99),
        "tail-even-columns-f32": normal(21, 50),
        "square-bf16": (normal(64, 256), bf16),
        "nested-f32": normal(300, 64),
        "nested-f16": (normal(150, 257), f16),
        "nested-wide-f32": wide(530),
        "zeros-f32": np.zeros((5, 64), f32),
        "zeros-odd-f32": np.zeros((3, 7), f32),
        "zero-block-f32": zero_block,
        "zero-block-bf16": (zero_block, bf16),
        "zero-tail-f32": zero_tail,
        "outliers-f32": outliers,
        "outliers-f16": (outliers, f16),
        "subnormal-f32": normal(4, 64, 1e-39),
        "subnormal-tail-f32": normal(1, 87, 1e-39),
        "subnormal-bf16": (normal(3, 64, 1e-39), bf16),
        "subnormal-f16": (normal(3, 64, 1e-6), f16),
        # The nested absmax has no finite reciprocal, and one absmax is just the mean: 0 times infinity.
        "subnormal-centred-f32": np.repeat(np.array([[1], [2], [3]], f32) * f32(2.0**-130), 64, axis=1),
        "large-f32": normal(6, 64, 1e37),
        "constant-f32": np.full((4, 64), -0.75, f32),
        "ties-f32": _near_boundaries(levels, np.ones(2), lambda v, _: v),
        "near-boundaries-f32": _near_boundaries(levels, rng.uniform(0.01, 2, 60), _neighbours(rng)),
        "near-boundaries-tail-f32": _near_boundaries(levels, rng.uniform(0.01, 2, 1), _neighbours(rng))[:, :63],
    }
    return {name: _tensor(case) for name, case in made.items()}


def _tensor(case: np.ndarray | tuple[np.ndarray, torch.dtype]) -> torch.Tensor:
    values, dtype = case if isinstance(case, tuple) else (case, torch.float32)
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


Nudge = Callable[[np.ndarray, int], np.ndarray]


def _near_boundaries(levels: np.ndarray, absmax: np.ndarray, nudge: Nudge) -> np.ndarray:
    """Blocks of which all values but the first stand on a boundary between two levels, where a division
    and a multiplication by the reciprocal part ways."""
    bounds = (levels[:-1] + levels[1:]) / f32(2)
    unit = np.append(f32(1), np.tile(bounds, 5)[: BLOCK - 1]).astype(f32)
    rows = [nudge(unit * f32(largest), row) for row, largest in enumerate(absmax)]
    return np.stack(rows).astype(f32)


def _neighbours(rng: np.random.Generator) -> Nudge:
    def nudge(values: np.ndarray, _row: int) -> np.ndarray:
        towards = rng.choice(np.array([-np.inf, 0, np.inf], f32), values.size)
        moved = np.where(towards == 0, values, np.nextafter(values, towards))
        moved[0] = values[0]
        return moved

    return nudge
