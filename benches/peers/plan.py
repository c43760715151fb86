"""The order of the measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from contenders import Contender
from settings import Settings


def interleaved(contenders: Sequence[Contender], settings: Settings) -> Iterator[tuple[str, int, Contender]]:
    """Job, round, contender. In turn from the front and from the back (A B B A), so that a slow drift of
    the machine hits all alike."""
    for job in settings.jobs:
        able = [contender for contender in contenders if job in contender.jobs]
        for number in range(settings.rounds):
            order = able if number % 2 == 0 else able[::-1]
            for contender in order:
                yield job, number, contender
