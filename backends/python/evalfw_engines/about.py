"""What engines say of themselves, of their libraries and of a CPU."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

VERSION = "0.1.0"


def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """The installed version of each distribution; `None` where it is not installed. Imports none of them."""
    return {name: version(name) for name in packages}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_device() -> dict[str, object]:
    """`DeviceInfo` of an engine on the CPU."""
    return {"kind": "cpu", "name": cpu_name(), "driver": None, "software": False, "memory_bytes": None}


def cpu_name() -> str:
    """The processor's name as the operating system has it, or its architecture."""
    try:
        if sys.platform == "linux":
            name = _cpuinfo("model name")
        elif sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        else:
            name = platform.processor()
    except (OSError, subprocess.CalledProcessError):
        name = ""
    return name or platform.machine()


def cpu_flags() -> set[str]:
    """The instruction sets that Linux lists; empty elsewhere."""
    try:
        return set(_cpuinfo("flags").split())
    except OSError:
        return set()


def _cpuinfo(field: str) -> str:
    """The value of the first line of this name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
