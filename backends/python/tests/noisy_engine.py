"""A worker whose engine prints in every way that a library can, run as a process by `test_process.py`."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

from support import FakeEngine

from evalfw_engines import pipes, protocol

C = ctypes.CDLL(None)


def shout(place: str) -> None:
    print(f"print {place}")
    sys.__stdout__.write(f"__stdout__ {place}\n")
    sys.__stdout__.flush()
    os.write(1, f"write {place}\n".encode())
    C.puts(f"puts {place}".encode())
    C.fflush(None)
    subprocess.run(["sh", "-c", f"echo child {place}; cat"], check=True)


class NoisyEngine(FakeEngine):
    def __init__(self) -> None:
        super().__init__()
        shout("open")

    def load(self, checkpoint, quantization, times):
        shout("load")
        return super().load(checkpoint, quantization, times)


if __name__ == "__main__":
    requests, replies = pipes.take()
    protocol.serve(NoisyEngine, requests, replies)
