"""Measures what the GPU can do at best, and prints one JSON line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib import metadata

import torch

# The widest product of Qwen2.5-Coder-0.5B and of 7B at 512 tokens, and ones where a library is at its best.
MATRICES = ((512, 896, 4864), (512, 3584, 18944), (4096, 4096, 4096), (8192, 8192, 8192))
# How torch is told to compute a product of f32: in itself, or in TF32.
TYPES = {
    "bf16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "f32": (torch.float32, "highest"),
}
COPY_BYTES = 2**31
# Several calls between two looks at the clock: a short product takes less than its launch is waited for.
CALLS = 20
SECONDS = 0.5


def fastest(work: Callable[[], object]) -> float:
    """The least mean time of a batch of calls, within a budget of seconds."""
    work()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        begin = time.perf_counter()
        for _ in range(CALLS):
            work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times) / CALLS


def matrix_rate(m: int, k: int, n: int, dtype: torch.dtype, precision: str) -> float:
    torch.set_float32_matmul_precision(precision)
    left, right = (torch.randn(shape, device="cuda").to(dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=dtype, device="cuda")
    return 2 * m * k * n / fastest(lambda: torch.mm(left, right, out=out))


def copy_rate() -> float:
    """Bytes read and written."""
    free, _total = torch.cuda.mem_get_info()
    size = min(COPY_BYTES, free // 4)
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source))


def measure() -> dict[str, object]:
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device")
    rates = {
        name: {"x".join(map(str, shape)): matrix_rate(*shape, *how) for shape in MATRICES}
        for name, how in TYPES.items()
    }
    return {
        "matrix_flops_per_second": rates,
        "copy_bytes_per_second": {"device": copy_rate()},
        "gpu": {"name": torch.cuda.get_device_name(0), "torch_cuda": torch.version.cuda},
        "versions": {"torch": metadata.version("torch")},
    }


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps(measure()))
