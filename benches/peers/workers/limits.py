"""Measures what this machine can do at best, and prints one JSON line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib import metadata

import torch

# The widest product of Qwen2.5-Coder-0.5B at 512 tokens, and ones where a library is at its best.
MATRICES = ((512, 896, 4864), (1024, 2048, 2048), (2048, 2048, 2048), (2048, 4096, 4096))
READ_BYTES = 2**30
SECONDS = 1.5


def fastest(work: Callable[[], object]) -> float:
    """The least time of many runs, within a budget of seconds; of one where that takes as long."""
    times: list[float] = []
    work()
    while not times or (len(times) < 3 and times[0] < SECONDS) or sum(times) < SECONDS:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def matrix_rate(m: int, k: int, n: int, dtype: torch.dtype) -> float:
    left, right = torch.rand(m, k).to(dtype), torch.rand(k, n).to(dtype)
    return 2 * m * k * n / fastest(lambda: left @ right)


def read_rate(values: torch.Tensor) -> float:
    return values.numel() * values.element_size() / fastest(values.sum)


def matrix_rates(dtype: torch.dtype) -> dict[str, float]:
    """By shape. Without instructions for a type its larger products would take minutes: they are left out."""
    rates: dict[str, float] = {}
    for m, k, n in MATRICES:
        rates[f"{m}x{k}x{n}"] = rate = matrix_rate(m, k, n, dtype)
        if 2 * m * k * n / rate > SECONDS:
            break
    return rates


def measure(threads: int, only_reads: bool) -> dict[str, object]:
    torch.set_num_threads(threads)
    rates = {} if only_reads else {
        name: matrix_rates(dtype) for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))
    }
    values = torch.ones(READ_BYTES // 4)
    reads = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        reads[str(count)] = read_rate(values)
    return {
        "matrix_flops_per_second": rates,
        "read_bytes_per_second": reads,
        "versions": {"torch": metadata.version("torch")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--only-reads", action="store_true", help="no matrix products")
    args = parser.parse_args()
    with torch.inference_mode():
        print(json.dumps(measure(args.threads, args.only_reads)))
