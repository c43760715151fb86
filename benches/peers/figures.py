"""Figures out of measurements: medians with their range, and ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from samples import Measurement, Samples
from settings import Settings


@dataclass(frozen=True)
class Quantity:
    name: str
    job: str
    values: Callable[[Samples, Settings], list[float]]
    higher_is_better: bool = False
    # Whether it is compared; no, where it says the same as another quantity.
    ratio: bool = True


def gigabytes(count: int | None) -> list[float]:
    """Nothing is no figure: an engine that took no memory of a device did not run there."""
    return [count / 1e9] if count else []


def rates(tokens: int, seconds: list[float]) -> list[float]:
    return [tokens / s for s in seconds]


def prompt_rates(samples: Samples, settings: Settings) -> list[float]:
    return rates(settings.prompt_tokens, samples.prompt_seconds)


def generate_rates(samples: Samples, settings: Settings) -> list[float]:
    return rates(settings.generate_tokens, samples.generate_seconds)


CPU_QUANTITIES = (
    Quantity("load, s", "load", lambda s, _: s.load_seconds),
    Quantity("peak GB", "load", lambda s, _: gigabytes(s.peak_bytes)),
    Quantity("s/step", "train", lambda s, _: s.step_seconds, ratio=False),
    Quantity("tokens/s", "train", lambda s, to: rates(to.sequence, s.step_seconds), True),
    Quantity("peak GB", "train", lambda s, _: gigabytes(s.peak_bytes)),
    Quantity("peak GB in the steps", "train", lambda s, _: gigabytes(s.train_peak_bytes)),
    Quantity("prompt tokens/s", "infer", prompt_rates, True),
    Quantity("generated tokens/s", "infer", generate_rates, True),
    Quantity("peak GB", "infer", lambda s, _: gigabytes(s.peak_bytes)),
)

CUDA_QUANTITIES = (
    Quantity("load, s", "load", lambda s, _: s.load_seconds),
    Quantity("device peak GB", "load", lambda s, _: gigabytes(s.device_peak_bytes)),
    Quantity("host peak GB", "load", lambda s, _: gigabytes(s.peak_bytes)),
    Quantity("s/step", "train", lambda s, _: s.step_seconds, ratio=False),
    Quantity("tokens/s", "train", lambda s, to: rates(to.sequence, s.step_seconds), True),
    Quantity("device peak GB", "train", lambda s, _: gigabytes(s.device_peak_bytes)),
    Quantity("host peak GB", "train", lambda s, _: gigabytes(s.peak_bytes)),
    Quantity("load, s", "train", lambda s, _: s.load_seconds, ratio=False),
)

QUANTITIES = {"cpu": CPU_QUANTITIES, "cuda": CUDA_QUANTITIES}


@dataclass(frozen=True)
class Figure:
    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float], middle: float | None = None) -> Figure | None:
        if not values:
            return None
        return cls(median(values) if middle is None else middle, min(values), max(values))


class Results:
    def __init__(self, measurements: list[Measurement], settings: Settings) -> None:
        self.settings = settings
        self.measurements = measurements

    def quantities(self, job: str) -> list[Quantity]:
        return [quantity for quantity in QUANTITIES[self.settings.device] if quantity.job == job]

    def contenders(self, job: str) -> list[str]:
        return list(dict.fromkeys(m.contender for m in self.measurements if m.job == job))

    def rounds(self, quantity: Quantity, contender: str) -> dict[int, list[float]]:
        return {
            m.round: quantity.values(m.samples, self.settings)
            for m in self.measurements
            if m.job == quantity.job and m.contender == contender and m.samples is not None
        }

    def figure(self, quantity: Quantity, contender: str) -> Figure | None:
        """The median over the samples of all rounds."""
        return Figure.of([v for values in self.rounds(quantity, contender).values() for v in values])

    def ratio(self, quantity: Quantity, contender: str, peer: str) -> Figure | None:
        """How many times better a contender is: over 1 is faster, or smaller. Of the medians over all rounds;
        the range is of the rounds by themselves."""

        def better(own: float, other: float) -> float:
            return own / other if quantity.higher_is_better else other / own

        own, other = self.figure(quantity, contender), self.figure(quantity, peer)
        if own is None or other is None:
            return None
        others = self.rounds(quantity, peer)
        by_round = [
            better(median(values), median(others[number]))
            for number, values in self.rounds(quantity, contender).items()
            if values and others.get(number)
        ]
        return Figure.of(by_round, better(own.middle, other.middle))
