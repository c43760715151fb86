"""What a GPU can do at best, with torch's own operations: the sizes and the rounds are those of the other engines."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

SIDE = 4096
# Of 4 bytes each.
ELEMENTS = 1 << 26
ROUNDS = 7
# Started one after the other before the device is waited for, so that starting them is not what is timed.
AT_ONCE = 4


@torch.no_grad()
def measure() -> dict[str, float | None]:
    vector = torch.rand(ELEMENTS, device="cuda")
    copied = shortest(lambda: vector.mul(2.0))
    return {
        "memory_bytes_per_second": 2 * ELEMENTS * 4 / copied,
        "f32_flops": flops(torch.float32),
        "bf16_flops": flops(torch.bfloat16),
    }


def flops(dtype: torch.dtype) -> float:
    matrix = torch.rand(SIDE, SIDE, device="cuda").to(dtype)
    return 2 * SIDE**3 / shortest(lambda: matrix @ matrix)


def shortest(work: Callable[[], object]) -> float:
    """Seconds of one run, the shortest of some: a limit is what is possible, not what is usual."""
    work()
    torch.cuda.synchronize()
    times = []
    for _ in range(ROUNDS):
        start = perf_counter()
        for _ in range(AT_ONCE):
            work()
        torch.cuda.synchronize()
        times.append((perf_counter() - start) / AT_ONCE)
    return min(times)
