"""Samples, and what a series of them says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from layerfs.bench import figures
from layerfs.bench.caches import Reached
from layerfs.bench.workload import Timing, Workload


@dataclass(frozen=True)
class Sample:
    """One measurement: a workload, once, on a fresh layer of one target."""

    target: str
    workload: Workload
    round: int
    timings: Sequence[Timing]
    counters: Mapping[str, int]
    cache: Reached | None


@dataclass(frozen=True)
class Series:
    """All samples' timings of one step of one workload on one target."""

    target: str
    workload: Workload
    step: str
    samples: Sequence[Sample]
    timings: Sequence[Timing]

    @property
    def seconds(self) -> list[float]:
        return [timing.seconds for timing in self.timings]

    @property
    def processor(self) -> list[float]:
        """Seconds of processor time; empty where a sample has none."""
        found = [timing.processor for timing in self.timings]
        return found if all(found) else []

    @property
    def speeds(self) -> list[float]:
        """Bytes or operations per second where the timings count them, otherwise seconds."""
        return [(t.operations or t.bytes) / t.seconds if t.operations or t.bytes else t.seconds for t in self.timings]

    @property
    def unit(self) -> str:
        """Of `speeds`: ``B/s``, ``op/s`` or ``s``."""
        first = self.timings[0]
        return "op/s" if first.operations else "B/s" if first.bytes else "s"

    @property
    def latencies(self) -> dict[float, int]:
        """Of all samples together."""
        together: dict[float, int] = {}
        for timing in self.timings:
            for latency, number in timing.latencies.items():
                together[latency] = together.get(latency, 0) + number
        return together

    @property
    def figures(self) -> dict[str, list[float]]:
        """What of it is compared, by name, with the seconds of every sample."""
        return figures.figures(self.step, self.seconds, self.processor, [timing.latencies for timing in self.timings])

    @property
    def counters(self) -> dict[str, list[int]]:
        """The values of each, of the samples that have it."""
        found: dict[str, list[int]] = {}
        for sample in self.samples:
            for name, value in sample.counters.items():
                found.setdefault(name, []).append(value)
        return found


@dataclass(frozen=True)
class Failure:
    """Work that could not be measured on a target.

    Attributes:
        workload: its label; "" where the target itself could not be made.
        reason: the error's text.
        known: whether it was known beforehand, and has not been tried.
    """

    target: str
    workload: str
    reason: str
    known: bool = False

    @property
    def words(self) -> str:
        """What could not be measured where, and why, for people."""
        return f"{self.workload or 'all'} on {self.target}: {self.reason}"


@dataclass(frozen=True)
class Run:
    """All samples of one invocation.

    Attributes:
        size: of the large file, in bytes; ``seed``: of every random choice.
        fingerprint: what it was measured on (`layerfs.bench.fingerprint`).
        warnings: what a reader of the figures should know, a sentence each.
    """

    started: datetime
    size: int
    seed: int
    targets: Sequence[str]
    samples: Sequence[Sample]
    fingerprint: Mapping[str, object]
    warnings: Sequence[str]
    failures: Sequence[Failure] = ()

    def series(self) -> list[Series]:
        """In the order of workloads, then steps, then targets."""
        place = {target: number for number, target in enumerate(self.targets)}

        def key(sample: Sample) -> tuple[str, list[object], int]:
            work = sample.workload
            return work.name, [getattr(work, name) for name in work.swept], place[sample.target]

        found = split(sorted(self.samples, key=key))
        order = {step: number for number, step in enumerate(dict.fromkeys((s.workload.label, s.step) for s in found))}
        return sorted(found, key=lambda s: order[s.workload.label, s.step])


def split(samples: Iterable[Sample]) -> list[Series]:
    """The samples as one series for each step of each workload on each target, in the order in which those come."""
    together: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        together.setdefault((sample.workload.label, sample.target), []).append(sample)
    found = []
    for group in together.values():
        group.sort(key=lambda sample: sample.round)
        steps: dict[str, list[tuple[Sample, Timing]]] = {}
        for sample in group:
            for timing in sample.timings:
                steps.setdefault(timing.step, []).append((sample, timing))
        for step, pairs in steps.items():
            took_part, timings = zip(*pairs, strict=True)
            found.append(Series(group[0].target, group[0].workload, step, took_part, timings))
    return found
