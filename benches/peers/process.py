"""Runs one measurement in a process of its own and watches its memory from outside."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gpu import Device

POLL_SECONDS = 0.05
# A GPU's steps are short, and an allocator may give memory back after each.
DEVICE_POLL_SECONDS = 0.01
EXIT_SECONDS = 10.0
TAIL_LINES = 15


@dataclass(frozen=True)
class Finished:
    code: int
    timed_out: bool
    stdout: str
    stderr_tail: list[str]
    wall_seconds: float
    # Sum of the high-water marks (VmHWM) of the processes of the tree.
    tree_peak_bytes: int
    # Of all cores' time, what went to other processes, or was taken from this machine by its host.
    foreign_cpu_share: float
    # Of the whole device: what was used before the process started, and the most above that while it ran.
    device_before_bytes: int | None = None
    device_peak_bytes: int | None = None

    @property
    def error(self) -> str | None:
        if self.timed_out:
            return "out of time"
        if self.code < 0:
            return f"killed by signal {-self.code}"
        return f"exit code {self.code}" if self.code else None


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    timeout_seconds: float,
    device: Device | None = None,
) -> Finished:
    """Raises OSError where the command cannot be started, or the device does not answer."""
    before = device.at_rest() if device else None
    most = before
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        cpu = CpuTimes.now()
        begin = time.monotonic()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        peaks: dict[int, int] = {}
        timed_out = False
        try:
            while child.poll() is None:
                peaks.update(high_water_marks(child.pid))
                if device and most is not None:
                    most = max(most, device.used_bytes())
                timed_out = time.monotonic() - begin > timeout_seconds
                if timed_out:
                    break
                time.sleep(DEVICE_POLL_SECONDS if device else POLL_SECONDS)
        finally:
            kill_tree(child)
        wall = time.monotonic() - begin
        return Finished(
            code=child.returncode,
            timed_out=timed_out,
            stdout=text(out),
            stderr_tail=tail(text(err)),
            wall_seconds=wall,
            tree_peak_bytes=sum(peaks.values()),
            foreign_cpu_share=CpuTimes.now().foreign_share_since(cpu, wall),
            device_before_bytes=before,
            device_peak_bytes=None if before is None or most is None else most - before,
        )


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of all cores since the machine started, and of this process with its ended children."""

    busy: float
    own: float

    @classmethod
    def now(cls) -> CpuTimes:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first.split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(busy, sum(usage.ru_utime + usage.ru_stime for usage in usages))

    def foreign_share_since(self, earlier: CpuTimes, wall_seconds: float) -> float:
        foreign = (self.busy - earlier.busy) - (self.own - earlier.own)
        return max(0.0, foreign / (wall_seconds * (os.cpu_count() or 1)))


def kill_tree(child: subprocess.Popen[bytes]) -> None:
    """Nothing that the child started is left behind to disturb the next measurement: not what is in its
    group, nor, where it is still alive, what has a group of its own."""
    pids = list(tree(child.pid))
    for pid in pids:
        kill(os.kill, pid)
    kill(os.killpg, child.pid)
    child.wait()
    # Giving back gigabytes takes the kernel a while.
    deadline = time.monotonic() + EXIT_SECONDS
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def alive(pid: int) -> bool:
    """Not gone, and not a zombie that only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill(send: Callable[[int, int], None], pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(pid, signal.SIGKILL)


def tree(root: int) -> Iterator[int]:
    pids = [root]
    for pid in pids:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except OSError:
            continue
        yield pid
        pids.extend(int(child) for child in children.split())


def high_water_marks(root: int) -> dict[int, int]:
    marks = {}
    for pid in tree(root):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                marks[pid] = int(line.split()[1]) * 1024
    return marks


def text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def tail(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.strip()][-TAIL_LINES:]
