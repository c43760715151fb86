"""What one process measured, in the terms that all contenders share."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Samples:
    """Only what counts: warm-up stays in `detail`, which is the contender's own answer."""

    detail: dict
    versions: dict[str, str]
    # Largest resident size of the whole process tree, and while it trained.
    peak_bytes: int | None = None
    train_peak_bytes: int | None = None
    # The most that the whole device had in use above what it had before: CUDA's context, libraries' workspaces
    # and free pages of allocators are in it.
    device_peak_bytes: int | None = None
    load_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    prompt_seconds: list[float] = field(default_factory=list)
    generate_seconds: list[float] = field(default_factory=list)
    # What one decoding step has to read.
    weight_bytes: int | None = None


@dataclass
class Measurement:
    contender: str
    job: str
    round: int
    command: str
    started_at: str
    wall_seconds: float = 0.0
    # Of all cores' time, what went to other processes: a busy machine shows here.
    foreign_cpu_share: float = 0.0
    # What the device had in use before the process: others' memory shows here.
    device_before_bytes: int | None = None
    # What the machine read per second just before and just after: its host may give it less or more at any time.
    read_rates: list[float] = field(default_factory=list)
    error: str | None = None
    stderr_tail: list[str] = field(default_factory=list)
    samples: Samples | None = None


class Wrong(Exception):
    """An answer that is not of the work that was asked for."""
