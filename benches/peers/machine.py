"""What machine this is, and what it can do at best."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import process
from gpu import Nvml
from prepare import HERE

# What decides which kernels a library takes.
TELLING_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)


# Of these, the ones that stand for products of bf16.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def cpuinfo() -> dict[str, str]:
    """Of the first core."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def flags_of(fields: dict[str, str]) -> set[str]:
    return set(fields.get("flags", fields.get("Features", "")).split())


def multiplies_bf16() -> bool:
    return bool(flags_of(cpuinfo()) & BF16_FLAGS)


def describe(gpu: Nvml | None = None) -> dict[str, object]:
    fields = cpuinfo()
    flags = flags_of(fields)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": fields.get("model name", platform.machine()),
        "flags": [flag for flag in TELLING_FLAGS if flag in flags],
        "logical_cores": logical_cores(),
        "memory_bytes": pages,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **({"gpu": gpu.describe()} if gpu else {}),
    }


def logical_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def limits(python: str, threads: int, gpu: Nvml | None = None) -> dict:
    """The matrix and memory rates by `workers/limits.py`, or by `workers/limits_cuda.py` on a GPU; an `error`
    where there are none."""
    workers = HERE / "workers"
    if gpu:
        command, environment = [python, str(workers / "limits_cuda.py")], gpu.environment()
    else:
        command = [python, str(workers / "limits.py"), "--threads", str(threads)]
        environment = {"OMP_NUM_THREADS": str(threads)}
    try:
        finished = process.run(command, environment, timeout_seconds=300)
        if finished.error:
            return {"error": finished.error, "stderr_tail": finished.stderr_tail}
        return json.loads(finished.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        return {"error": str(error)}


def read_rate(python: str, threads: int) -> float | None:
    """Bytes that one or all threads read per second now, the better of the two."""
    command = [python, str(HERE / "workers" / "limits.py"), "--threads", str(threads), "--only-reads"]
    try:
        finished = process.run(command, {"OMP_NUM_THREADS": str(threads)}, timeout_seconds=60)
        return max(json.loads(finished.stdout.splitlines()[-1])["read_bytes_per_second"].values())
    except (OSError, ValueError, IndexError, KeyError):
        return None


def best(taken: list[dict]) -> dict[str, float]:
    """The highest of each limit: anything less was a disturbance."""
    found: dict[str, float] = {}
    for limit in taken:
        rates = {
            f"{dtype} matrix product": max(shapes.values())
            for dtype, shapes in limit.get("matrix_flops_per_second", {}).items()
        }
        reads = {
            f"memory read, {count} thread{'' if count == '1' else 's'}": rate
            for count, rate in limit.get("read_bytes_per_second", {}).items()
        }
        copies = {
            f"{place} memory copy, in and out": rate
            for place, rate in limit.get("copy_bytes_per_second", {}).items()
        }
        for name, rate in {**rates, **reads, **copies}.items():
            found[name] = max(rate, found.get(name, 0.0))
    return found
