"""Runs one measurement in a process of its own and watches its memory from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.05
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

    @property
    def error(self) -> str | None:
        if self.timed_out:
            return "out of time"
        if self.code < 0:
            return f"killed by signal {-self.code}"
        return f"exit code {self.code}" if self.code else None


def run(command: Sequence[str], environment: Mapping[str, str], timeout_seconds: float) -> Finished:
    """Raises OSError where the command cannot be started."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
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
                timed_out = time.monotonic() - begin > timeout_seconds
                if timed_out:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            kill_group(child)
        wall = time.monotonic() - begin
        return Finished(child.returncode, timed_out, text(out), tail(text(err)), wall, sum(peaks.values()))


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """The child leads a group: nothing that it started is left behind to disturb the next measurement."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def high_water_marks(root: int) -> dict[int, int]:
    marks = {}
    pids = [root]
    for pid in pids:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        pids.extend(int(child) for child in children.split())
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                marks[pid] = int(line.split()[1]) * 1024
    return marks


def text(file: tempfile._TemporaryFileWrapper[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def tail(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.strip()][-TAIL_LINES:]
