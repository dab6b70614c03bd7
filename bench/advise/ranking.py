"""Drivers in the order in which they suit some work, by the figures of one run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import itemgetter
from statistics import median
from typing import Any

from layerfs.bench import statistics
from layerfs.bench.advise.needs import Figure, Need
from layerfs.bench.claims.evidence import Evidence
from layerfs.bench.statistics import Interval
from layerfs.bench.workload import discover

_ENOUGH_SAMPLES = 5  # fewer can come out in any order by chance


@dataclass(frozen=True)
class Measured:
    """One figure on several drivers.

    Attributes:
        need: that it speaks for.
        samples: by driver, seconds or what the counter counts.
    """

    need: str
    figure: Figure
    samples: Mapping[str, Sequence[float]]

    def over(self, driver: str, other: str) -> Interval:
        """How many times as much ``driver`` takes as ``other``."""
        return statistics.ratio(self.samples[driver], self.samples[other])


@dataclass(frozen=True)
class Ranking:
    """Drivers for some needs, all needs being of equal weight.

    Attributes:
        drivers: the best one first.
        overall: by driver, how many times as much it takes as the best one (geometric mean over needs).
        measured: the figures behind it.
        missing: what the needs would be judged by as well, and the run does not have of all these drivers.
        incomplete: drivers that lack a figure which these have.
    """

    drivers: Sequence[str]
    overall: Mapping[str, Interval]
    measured: Sequence[Measured]
    missing: Sequence[Figure]
    incomplete: Sequence[str]

    @property
    def fewest(self) -> int:
        """Samples of the figure that has the fewest."""
        return min(len(samples) for one in self.measured for samples in one.samples.values())

    @property
    def by_chance(self) -> bool:
        """Whether some figure has so few samples that the order may be chance."""
        return self.fewest < _ENOUGH_SAMPLES

    @property
    def equals(self) -> list[str]:
        """Drivers that the samples cannot tell from the best one."""
        return [driver for driver in self.drivers[1:] if self.overall[driver].low <= 1]


def rank(needs: Sequence[Need], run: Evidence, allowed: Collection[str]) -> Ranking:
    """Rank the drivers of a run that are ``allowed``; there may be none left."""
    found = [Measured(need.id, figure, _samples(figure, run, allowed)) for need in needs for figure in need.figures]
    everywhere = {driver for one in found for driver in one.samples}
    compared = _compared(found, everywhere)
    measured = [one for one in found if compared and compared <= set(one.samples)]
    missing = [one.figure for one in found if one not in measured]
    if not measured:
        return Ranking([], {}, [], missing, sorted(everywhere))
    weights, first = _weights(measured), min(compared)
    order = sorted(compared, key=lambda driver: _overall(measured, weights, driver, first).middle)
    overall = {driver: _overall(measured, weights, driver, order[0]) for driver in order}
    return Ranking(order, overall, measured, missing, sorted(everywhere - compared))


def _compared(found: Sequence[Measured], drivers: Collection[str]) -> frozenset[str]:
    """Where not all have all figures: several drivers, for as many needs as can be, and then as many as can be."""

    def worth(some: frozenset[str]) -> tuple[bool, int, int, int]:
        common = [one.need for one in found if some <= set(one.samples)]
        return len(some) > 1 and bool(common), len(set(common)), len(some), len(common)

    some = [frozenset(names) for size in range(1, len(drivers) + 1) for names in combinations(sorted(drivers), size)]
    return max(some, key=worth, default=frozenset())


def _weights(measured: Sequence[Measured]) -> list[float]:
    """One for each need together, whatever the number of its figures; all of them sum to one."""
    needs = [one.need for one in measured]
    return [1 / needs.count(need) / len(set(needs)) for need in needs]


def _overall(measured: Sequence[Measured], weights: Sequence[float], driver: str, best: str) -> Interval:
    if driver == best:
        return Interval(1.0, 1.0, 1.0)
    pairs = [(one.samples[driver], one.samples[best]) for one in measured]
    return statistics.mean_ratio(pairs, weights)


def _samples(figure: Figure, run: Evidence, allowed: Collection[str]) -> dict[str, list[float]]:
    """Of the variant of the workload that most drivers have and, among those, has the largest file, and is closest to
    the usual one; not of one that says nothing of the need."""
    variants: dict[tuple[tuple[str, str], ...], dict[str, dict[str, Mapping[str, Any]]]] = {}
    for benchmark in run.benchmarks:
        extra, parameters = benchmark["extra_info"], dict(benchmark["params"])
        if extra["workload"] != figure.workload or parameters.pop("target") not in allowed:
            continue
        if all(parameters.get(name, 0) >= least for name, least in figure.least.items()):
            variant = tuple((name, str(value)) for name, value in parameters.items())
            variants.setdefault(variant, {}).setdefault(extra["target"], {})[extra["step"]] = benchmark
    usual = {(name, str(value)) for name, value in discover()[figure.workload].defaults().items()}
    found = [
        (len(samples), int(dict(variant).get("size", 0)), len(usual & set(variant)), samples)
        for variant, steps in variants.items()
        if (samples := _figures(figure, steps))
    ]
    return max(found, key=itemgetter(slice(3)), default=(0, 0, 0, {}))[-1]


def _figures(figure: Figure, targets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for target, steps in targets.items():
        if figure.counter:
            counted = next(iter(steps.values()))["extra_info"]["counters"].get(figure.counter, [])
            found[target] = [float(value) for value in counted]
        elif set(figure.steps) <= set(steps):
            data = [steps[step]["stats"]["data"] for step in figure.steps]
            found[target] = [float(sum(parts)) for parts in zip(*data, strict=True)]
    return {target: samples for target, samples in found.items() if samples and median(samples) > 0}
