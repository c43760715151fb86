"""The device, and the type that is computed in there.

`EVALFW_DEVICE` is `cpu` or `cuda`; without it a GPU is taken where torch sees one. `EVALFW_COMPUTE_DTYPE` is `f32` or
`bf16`; without it a GPU computes in bf16, and a CPU only where it has instructions for it: without, its products in
bf16 are far slower than in f32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import bitsandbytes
import torch

from ... import about
from ...errors import Input, Unavailable, Wrong

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True)
class Device:
    # `cpu` or `cuda`
    kind: str
    # A key of `DTYPES`.
    compute: str

    @classmethod
    def open(cls) -> Device:
        """Makes CUDA's context too, so that no load pays for it."""
        kind = choose("EVALFW_DEVICE", ("cpu", "cuda")) or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cuda":
            check_cuda()
        has_bf16 = kind == "cuda" or bool(BF16_INSTRUCTIONS & about.cpu_flags())
        compute = choose("EVALFW_COMPUTE_DTYPE", tuple(DTYPES)) or ("bf16" if has_bf16 else "f32")
        return cls(kind, compute)

    @property
    def torch(self) -> torch.device:
        return torch.device("cuda:0" if self.kind == "cuda" else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.compute]

    def info(self) -> dict[str, object]:
        """The protocol's `DeviceInfo`."""
        if self.kind == "cpu":
            return about.cpu_device()
        properties = torch.cuda.get_device_properties(0)
        unified = bool(properties.is_integrated)
        return {
            "kind": "unified_gpu" if unified else "discrete_gpu",
            "name": properties.name,
            "driver": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
            "software": False,
            "memory_bytes": None if unified else properties.total_memory,
        }

    def synchronize(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> dict[str, int | None]:
        """What torch's allocator knows; of a CPU it knows nothing."""
        if self.kind == "cpu":
            return {"in_use_bytes": None, "reserved_bytes": None, "peak_bytes": None}
        return {
            "in_use_bytes": torch.cuda.memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
            "peak_bytes": torch.cuda.max_memory_reserved(),
        }


def choose(variable: str, known: tuple[str, ...]) -> str | None:
    """The value of an environment variable, which must be one of those known."""
    value = os.environ.get(variable) or None
    if value is not None and value not in known:
        raise Input(f"{variable} is {value}, expected {' or '.join(known)}")
    return value


def check_cuda() -> None:
    """That torch sees a GPU and that bitsandbytes computes there: without a library for this CUDA it falls back without
    a word."""
    if not torch.cuda.is_available():
        raise Unavailable(
            f"torch {torch.__version__} sees no GPU", "install an NVIDIA driver and a build of torch for its CUDA"
        )
    torch.cuda.init()
    library = bitsandbytes.cextension.lib
    if not getattr(library, "compiled_with_cuda", False):
        reason = vars(library).get("error_msg", "it took its library for the CPU")
        raise Unavailable(
            f"bitsandbytes has no library for CUDA {torch.version.cuda}: {reason}",
            "install a version of bitsandbytes for this CUDA",
        )
    values = torch.linspace(-1, 1, 64 * 64, device="cuda").view(64, 64)
    packed, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4")
    error = float((bitsandbytes.functional.dequantize_4bit(packed, state) - values).abs().max())
    # Half of the widest gap between two of NF4's values is 0.152 of a block's largest.
    if not error < 0.16:
        raise Wrong(f"bitsandbytes computes wrong on this GPU: NF4 is off by {error}")
