"""What a GPU can do at best, with MLX's own operations; timed as the other engines time theirs."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

# The harness's own figures for all engines.
SIDE = 4096
ELEMENTS = 1 << 26
ROUNDS = 7
AT_ONCE = 4


def measure() -> dict[str, float | None]:
    values = mx.zeros(ELEMENTS, mx.float32)
    mx.eval(values)
    copied = shortest(lambda: -values)
    del values
    mx.clear_cache()
    return {
        "memory_bytes_per_second": 2 * 4 * ELEMENTS / copied,
        "f32_flops": flops(mx.float32),
        "bf16_flops": flops(mx.bfloat16),
    }


def flops(dtype: mx.Dtype) -> float:
    left, right = (mx.random.normal((SIDE, SIDE)).astype(dtype) for _ in range(2))
    mx.eval(left, right)
    seconds = shortest(lambda: left @ right)
    mx.clear_cache()
    return 2 * SIDE**3 / seconds


def shortest(work: Callable[[], mx.array]) -> float:
    """Seconds of one run, the shortest of some, of several that are started before the device is waited for."""
    mx.eval(work())
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        mx.eval([work() for _ in range(AT_ONCE)])
        best = min(best, (time.perf_counter() - start) / AT_ONCE)
    return best
