"""An NVIDIA GPU seen from outside, through the driver's own library (NVML)."""

from __future__ import annotations

import ctypes
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

# By its name where the loader knows it, else where container runtimes and WSL put it.
LIBRARIES = (
    "libnvidia-ml.so.1",
    "/usr/local/nvidia/lib64/libnvidia-ml.so.1",
    "/usr/lib/wsl/lib/libnvidia-ml.so.1",
)
TEXT_BYTES = 96
REST_SECONDS = 5.0
REST_POLL_SECONDS = 0.1


class NvmlError(OSError):
    """The GPU, or its driver, is not there or does not answer."""


class Device(ABC):
    @abstractmethod
    def used_bytes(self) -> int:
        """Of the whole device, whoever uses them."""

    def at_rest(self) -> int:
        """Used bytes, once an ended process has given its own back."""
        used = self.used_bytes()
        deadline = time.monotonic() + REST_SECONDS
        while time.monotonic() < deadline:
            time.sleep(REST_POLL_SECONDS)
            now = self.used_bytes()
            if now >= used:
                return now
            used = now
        return used


class Memory(ctypes.Structure):
    """nvmlMemory_t"""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class Nvml(Device):
    """It stays open while anything is measured, so that the driver keeps the GPU initialised and its own
    memory is used before as well as during a measurement."""

    def __init__(self, library: object, index: int) -> None:
        self.library = library
        self.index = index
        self.handle = ctypes.c_void_p()
        self.call("nvmlInit_v2")
        self.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(self.handle))

    @classmethod
    def open(cls) -> Nvml:
        index = visible_index(os.environ.get("CUDA_VISIBLE_DEVICES"))
        reasons = []
        for name in LIBRARIES:
            try:
                return cls(ctypes.CDLL(name), index)
            except NvmlError:
                raise
            except OSError as error:
                reasons.append(str(error))
        raise NvmlError(f"--device cuda needs an NVIDIA GPU and its driver: {reasons[0]}")

    def call(self, name: str, *arguments: object) -> None:
        function: Callable[..., int] = getattr(self.library, name)
        status = function(*arguments)
        if status != 0:
            raise NvmlError(f"{name} said {status}: nvidia-smi shows whether GPU {self.index} can be used")

    def text(self, name: str, *before: object) -> str:
        buffer = ctypes.create_string_buffer(TEXT_BYTES)
        self.call(name, *before, buffer, ctypes.c_uint(TEXT_BYTES))
        return buffer.value.decode(errors="replace")

    def memory(self) -> Memory:
        memory = Memory()
        self.call("nvmlDeviceGetMemoryInfo", self.handle, ctypes.byref(memory))
        return memory

    def used_bytes(self) -> int:
        return self.memory().used

    def describe(self) -> dict[str, object]:
        cuda = ctypes.c_int()
        self.call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
        return {
            "name": self.text("nvmlDeviceGetName", self.handle),
            "memory_bytes": self.memory().total,
            "driver": self.text("nvmlSystemGetDriverVersion"),
            "driver_cuda": f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",
        }

    def environment(self) -> dict[str, str]:
        """With which CUDA shows a process just this GPU, and counts as NVML does."""
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(self.index)}


def visible_index(visible: str | None) -> int:
    """The first GPU that CUDA may use, by its number on the bus."""
    if visible is None:
        return 0
    first = visible.split(",")[0].strip()
    if not first.isdigit():
        raise NvmlError(f"CUDA_VISIBLE_DEVICES is {visible!r}: name the GPU by its number in nvidia-smi")
    return int(first)
