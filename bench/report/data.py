"""Run files as a report needs them: figures with all that was kept of them, by machine, the newest of each first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from statistics import median
from typing import Any

from layerfs.bench import recorded, statistics
from layerfs.bench.native import NATIVE
from layerfs.bench.recorded import quantity
from layerfs.bench.report.axes import value_words
from layerfs.bench.statistics import Interval
from layerfs.bench.target_name import AGAIN

Scalar = str | float | bool | None


@dataclass(frozen=True)
class Figure:
    """One step of one workload on one target in one run.

    Attributes:
        parameters: of the workload, by name, without its size; ``state`` is the cache's, for every workload.
        seconds: of every sample; ``amounts``: bytes or operations of every sample, as ``unit`` says.
        unit: ``B/s``, ``op/s`` or ``s``.
        latencies: of all samples together, as in `layerfs.bench.workload.Timing`.
        counters: of every sample.
        courses: of samples that kept one, as in `layerfs.bench.workload.Timing`.
    """

    workload: str
    step: str
    target: str
    size: int
    parameters: Mapping[str, Scalar]
    seconds: Sequence[float]
    amounts: Sequence[float]
    unit: str
    latencies: Mapping[float, int]
    counters: Mapping[str, Sequence[int]]
    courses: Sequence[Sequence[float]]

    @property
    def what(self) -> tuple[object, ...]:
        """What was measured, without on which target."""
        return self.workload, self.step, self.size, tuple(sorted(self.parameters.items(), key=str))

    @cached_property
    def middle(self) -> float:
        """The median of the seconds."""
        return median(self.seconds)

    @cached_property
    def time(self) -> Interval:
        """The same with its interval."""
        return statistics.median(self.seconds)

    @cached_property
    def rate(self) -> Interval:
        """In `unit`."""
        if self.unit == "s":
            return self.time
        return statistics.median([a / s for a, s in zip(self.amounts, self.seconds, strict=True) if s])

    @cached_property
    def bytes_rate(self) -> Interval | None:
        """Bytes a second, of operations on blocks too; None where there are neither."""
        block = self.parameters.get("block")
        if self.unit == "op/s" and isinstance(block, int | float) and block > 0:
            return Interval(self.rate.low * block, self.rate.middle * block, self.rate.high * block)
        return self.rate if self.unit == "B/s" else None

    def counter(self, name: str) -> Interval | None:
        return statistics.median(self.counters[name]) if self.counters.get(name) else None


@dataclass(frozen=True)
class RunFile:
    """One run.

    Attributes:
        name: the file's; ``machine``: what other runs must have in common with it; ``facts``: its fingerprint.
    """

    name: str
    started: datetime
    machine: Mapping[str, object]
    facts: Mapping[str, Any]
    warnings: Sequence[str]
    targets: Sequence[str]
    figures: Sequence[Figure]
    commit: str


@dataclass
class Machine:
    """Runs whose figures may be compared, the oldest first."""

    runs: list[RunFile] = field(default_factory=list)

    @property
    def newest(self) -> RunFile:
        return self.runs[-1]

    @property
    def facts(self) -> dict[str, object]:
        together: dict[str, object] = {}
        for run in self.runs:
            together |= run.machine
        return together

    @cached_property
    def figures(self) -> list[Figure]:
        """Of each thing measured the newest."""
        found: dict[tuple[object, ...], Figure] = {}
        for run in self.runs:
            found |= {(*figure.what, figure.target): figure for figure in run.figures}
        return list(found.values())

    @cached_property
    def targets(self) -> list[str]:
        """The control first, the others in the runs' order; a calibration's second ones are left out."""
        names = [name for run in self.runs for name in run.targets if not name.endswith(AGAIN)]
        return sorted(dict.fromkeys(names), key=lambda name: name != NATIVE)

    @cached_property
    def courses(self) -> dict[tuple[object, ...], list[tuple[RunFile, Figure]]]:
        """What several runs measured, with each of them, by `Figure.what` and target."""
        found: dict[tuple[object, ...], list[tuple[RunFile, Figure]]] = {}
        for run in self.runs:
            for figure in (figure for figure in run.figures if figure.target in self.targets):
                found.setdefault((*figure.what, figure.target), []).append((run, figure))
        return {key: course for key, course in found.items() if len(course) > 1}

    def of(self, workload: str, step: str | None = None) -> list[Figure]:
        """In the order of targets."""
        known = {name: number for number, name in enumerate(self.targets)}
        found = [f for f in self.figures if f.workload == workload and step in (None, f.step) and f.target in known]
        return sorted(found, key=lambda figure: known[figure.target])

    @cached_property
    def varied(self) -> dict[str, list[str]]:
        """By workload, the parameters of which there are several values."""
        values: dict[str, dict[str, set[object]]] = {}
        for figure in self.figures:
            for name, value in figure.parameters.items():
                values.setdefault(figure.workload, {}).setdefault(name, set()).add(value)
        return {work: [n for n, found in names.items() if len(found) > 1] for work, names in values.items()}

    def words(self, figure: Figure, *but: str) -> list[str]:
        """What sets its variant of the workload apart from the others that were measured, without some parameters."""
        names = [name for name in self.varied.get(figure.workload, []) if name not in but]
        return [value_words(name, figure.parameters.get(name)) for name in names]


def grouped(runs: Iterable[RunFile]) -> list[Machine]:
    """By machine, in the order of time."""
    machines: list[Machine] = []
    for run in sorted(runs, key=lambda run: run.started):
        for machine in machines:
            if not recorded.differences(machine.facts, run.machine):
                machine.runs.append(run)
                break
        else:
            machines.append(Machine([run]))
    return machines


def parse(document: Any, name: str) -> RunFile:
    """A run file's document. Raises `InvalidArgument`."""
    known = recorded.parse(document, name)
    try:
        own = document["layerfs"]
        started = datetime.fromisoformat(document["datetime"])
        return RunFile(
            name=name,
            started=started if started.tzinfo else started.replace(tzinfo=UTC),
            machine=known.setting,
            facts=dict(own["fingerprint"]),
            warnings=[str(warning) for warning in known.warnings],
            targets=[str(target) for target in own["targets"]],
            figures=[_figure(benchmark) for benchmark in document["benchmarks"]],
            commit=str(document.get("commit_info", {}).get("id", "")),
        )
    except recorded.NOT_A_RUN as error:
        raise recorded.no_run(name, error) from error


def _figure(benchmark: Any) -> Figure:
    extra, parameters = benchmark["extra_info"], dict(benchmark["params"])
    parameters.pop("target", None)
    size = int(quantity(parameters.pop("size")))
    parameters.setdefault("state", " and ".join(sorted({str(c["asked"]) for c in extra.get("cache", ())})) or "any")
    seconds = recorded.samples(benchmark)
    operations = [quantity(value) for value in extra["operations"]]
    moved = [quantity(value) for value in extra["bytes"]]
    unit = "op/s" if all(operations) else "B/s" if all(moved) else "s"
    latencies: dict[float, int] = {}
    for sample in extra["latencies"]:
        for latency, count in sample:
            latencies[quantity(latency)] = latencies.get(quantity(latency), 0) + int(quantity(count))
    return Figure(
        workload=str(extra["workload"]),
        step=str(extra["step"]),
        target=str(extra["target"]),
        size=size,
        parameters={str(name): _scalar(value) for name, value in parameters.items()},
        seconds=seconds,
        amounts=operations if unit == "op/s" else moved,
        unit=unit,
        latencies=latencies,
        counters={str(name): [int(quantity(v)) for v in values] for name, values in extra["counters"].items()},
        courses=[[quantity(value) for value in course] for course in extra.get("courses", ())],
    )


def _scalar(value: Any) -> Scalar:
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
