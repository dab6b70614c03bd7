"""How far apart two measurements of one and the same thing come out on this machine: the A/A test.

A calibrating run has every driver twice, each with a store of its own, in the same blocks. Whatever differs between
the two is noise, of the clock as well as of where on the disk a store happens to lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from layerfs.bench import statistics
from layerfs.bench.results import Run
from layerfs.bench.statistics import Interval
from layerfs.bench.target_name import AGAIN, first_of_pair


@dataclass(frozen=True, slots=True)
class Noise:
    """Of one step of one workload on one driver.

    Attributes:
        workload: its label, with the values of swept parameters.
        ratio: the second target's time over the first one's; without noise it were 1.
        threshold: the farthest from 1 that the interval of ``ratio`` reaches, as a part (0.08 is 8 %); a difference
            that is no larger says nothing.
    """

    workload: str
    step: str
    target: str
    ratio: Interval
    threshold: float


def twice(drivers: Sequence[str]) -> list[str]:
    """The names of a calibrating run's targets."""
    return [name for driver in drivers for name in (driver, driver + AGAIN)]


def measured(run: Run) -> list[Noise]:
    """What a calibrating run says; nothing for any other run."""
    found = {
        (series.workload.label, name, series.target): seconds
        for series in run.series()
        for name, seconds in series.figures.items()
    }
    return [
        noise(label, name, first, found[label, name, first], again)
        for (label, name, target), again in found.items()
        if (first := first_of_pair(target)) and (label, name, first) in found
    ]


def noise(workload: str, step: str, target: str, first: Sequence[float], second: Sequence[float]) -> Noise:
    """From the seconds of two measurements of the same thing."""
    ratio = statistics.ratio(second, first)
    return Noise(workload, step, target, ratio, max(ratio.high, 1 / ratio.low) - 1)


def entries(noises: Sequence[Noise]) -> list[dict[str, object]]:
    """For the run file."""
    return [asdict(noise) for noise in noises]


def thresholds(entries: Sequence[Mapping[str, object]]) -> dict[tuple[str, str, str], float]:
    """By workload, step and target, from a run file."""
    return {
        (str(entry["workload"]), str(entry["step"]), str(entry["target"])): float(str(entry["threshold"]))
        for entry in entries
    }
