"""What bitsandbytes computes on the CPU for NF4, written out once more in numpy.

It says in few lines what an engine has to do to be equal bit by bit. All arithmetic is f32, one
rounding for each operation; bf16 and f16 sources are widened first.
"""

from __future__ import annotations

import numpy as np

f32 = np.float32
BLOCK = 64
NESTED_BLOCK = 256
SMALLEST_ABSMAX = f32(1e-38)


def quantize(values: np.ndarray, levels: np.ndarray, code_map: np.ndarray) -> dict[str, np.ndarray]:
    flat = values.reshape(-1)
    bounds = (levels[:-1] + levels[1:]) / f32(2)
    indices, absmax = [], []
    for start in range(0, flat.size, BLOCK):
        scaled, largest = _scale(flat[start : start + BLOCK])
        indices.append(np.searchsorted(bounds, scaled, side="left"))
        absmax.append(largest)
    nibbles = np.concatenate(indices).astype(np.uint8)
    if flat.size % 2:
        nibbles = np.append(nibbles, np.uint8(np.searchsorted(bounds, f32(0))))
    absmax_codes, nested_absmax, offset = _quantize_absmax(np.array(absmax, f32), code_map)
    per_block = code_map[absmax_codes] * np.repeat(nested_absmax, NESTED_BLOCK)[: len(absmax)] + offset
    decoded = levels[nibbles[: flat.size]] * np.repeat(per_block, BLOCK)[: flat.size]
    return {
        "codes": nibbles[::2] << 4 | nibbles[1::2],
        "absmax_codes": absmax_codes,
        "nested_absmax": nested_absmax,
        "offset": np.array([offset], f32),
        "decoded": decoded.reshape(values.shape),
    }


def _scale(block: np.ndarray) -> tuple[np.ndarray, f32]:
    """A full block is multiplied by a reciprocal; a last block that is not full is divided, and its
    stored absmax is never 0."""
    largest = np.abs(block).max()
    floor = max(largest, SMALLEST_ABSMAX)
    if block.size == BLOCK:
        return block * (f32(1) / floor), largest
    return block / floor, floor


def _quantize_absmax(absmax: np.ndarray, code_map: np.ndarray) -> tuple[np.ndarray, np.ndarray, f32]:
    offset = f32(torch_sum(absmax) / f32(absmax.size))
    centred = absmax - offset
    table = _lookup_table(code_map)
    codes, nested = [], []
    for start in range(0, centred.size, NESTED_BLOCK):
        block = centred[start : start + NESTED_BLOCK]
        largest = np.abs(block).max()
        nested.append(largest)
        if largest == 0:
            codes.append(np.zeros(block.size, np.uint8))  # code 0, which is not the code of the value 0
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # a subnormal has no finite reciprocal
            scaled = np.clip(block * (f32(1) / largest), f32(-1), f32(1))
        unit = (scaled + f32(1)) * f32(0.5)
        # One fused multiply-add: f64 holds product and sum exactly, so that there is one rounding.
        position = (unit.astype(np.float64) * 65535 + 0.5).astype(f32)
        position[np.isnan(position)] = 0
        codes.append(table[position.astype(np.int64)])
    return np.concatenate(codes), np.array(nested, f32), offset


def _lookup_table(code_map: np.ndarray) -> np.ndarray:
    """The nearest code is looked up for 65536 points, not computed for the value itself: near a
    boundary it can be the second nearest."""
    points = f32(2) * np.arange(65536).astype(f32) / f32(65535) - f32(1)
    bounds = f32(0.5) * (code_map[:-1] + code_map[1:])
    return np.searchsorted(bounds, points, side="left").astype(np.uint8)


def torch_sum(values: np.ndarray) -> f32:
    """The order in which torch adds up f32 on one thread of an x86 CPU: 4 rows of 8 lanes, in a cascade
    of 4 levels. The offset is a mean, and every decoded value depends on its last bit."""
    lanes = 8 if values.size >= 8 else 1
    vectors = values.size // lanes
    body = values[: vectors * lanes].reshape(vectors, lanes)
    in_rows = vectors // 4 * 4
    total = _cascade(body[:in_rows].reshape(-1, 4, lanes))
    for vector in body[in_rows:]:
        total[0] += vector
    for row in total[1:]:
        total[0] += row
    result = f32(0)
    for value in [*values[vectors * lanes :], *total[0]]:
        result = f32(result + value)
    return result


def _cascade(grid: np.ndarray) -> np.ndarray:
    levels = 4
    power = max(4, max(len(grid) - 1, 0).bit_length() // levels)
    sums = np.zeros((levels, *grid.shape[1:]), f32)
    for i, rows in enumerate(grid, start=1):
        sums[0] += rows
        for level in range(1, levels):
            if i % (1 << level * power):
                break
            sums[level] += sums[level - 1]
            sums[level - 1] = 0
    for level in range(1, levels):
        sums[0] += sums[level]
    return sums[0]
