"""Run files read back: what a comparison needs of them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from layerfs.bench import calibration, figures, runfile, workload
from layerfs.bench.results import Run
from layerfs.bench.target_name import first_of_pair
from layerfs.errors import InvalidArgument, refused

_MOST = 1e18  # above that a figure is none of a run's, and pictures would lose their scale
_K = TypeVar("_K")
_V = TypeVar("_V")


class Key(NamedTuple):
    """What was measured.

    Attributes:
        workload: its label, with the values of swept parameters.
    """

    workload: str
    step: str
    target: str

    def __str__(self) -> str:
        return f"{self.workload}: {self.step} on {self.target}"


class CounterKey(NamedTuple):
    workload: str
    counter: str
    target: str

    def __str__(self) -> str:
        return f"{self.workload}: {self.counter} on {self.target}"


class Subject(NamedTuple):
    """What belongs together: all steps and counters of a workload on a target.

    Attributes:
        workload: its label; "" for all of the target.
    """

    workload: str
    target: str

    @classmethod
    def of(cls, key: Key | CounterKey) -> Subject:
        return cls(key.workload, key.target)


_AnyKey = TypeVar("_AnyKey", Key, CounterKey, Subject)


@dataclass(frozen=True)
class Recorded:
    """The samples of one side of a comparison.

    Attributes:
        name: of the file, for messages.
        machine: what the runs of both sides must have in common, by name.
        seconds: of every sample of a step.
        counters: of every sample; the lower, the better.
        thresholds: of a calibration, as parts.
        warnings: of the runs.
        conditions: how it was measured, by name; figures of other conditions do not compare.
        failures: why something could not be measured.
    """

    name: str
    machine: Mapping[str, object]
    seconds: Mapping[Key, Sequence[float]]
    counters: Mapping[CounterKey, Sequence[int]]
    thresholds: Mapping[Key, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    conditions: Mapping[Subject, Mapping[str, object]] = field(default_factory=dict)
    failures: Mapping[Subject, str] = field(default_factory=dict)

    def only(self, target: str, named: str) -> Recorded:
        """What belongs to one target, under another name."""

        def taken(all_: Mapping[_AnyKey, _V]) -> dict[_AnyKey, _V]:
            return {key._replace(target=named): value for key, value in all_.items() if key.target == target}

        return replace(
            self,
            seconds=taken(self.seconds),
            counters=taken(self.counters),
            thresholds=taken(self.thresholds),
            conditions=taken(self.conditions),
            failures=taken(self.failures),
        )

    def joined(self) -> Recorded:
        """A calibrating run, with both measurements of each driver as one that has twice the samples."""
        return replace(
            self,
            seconds=_gathered((_of_first(key), times) for key, times in self.seconds.items()),
            counters=_gathered((_of_first(key), values) for key, values in self.counters.items()),
            conditions={_of_first(key): names for key, names in self.conditions.items()},
            failures={_of_first(key): reason for key, reason in self.failures.items()},
        )

    def failure(self, key: Key | CounterKey) -> str:
        """Why the figure is not there, in the system's words; "" where nothing failed."""
        return self.failures.get(Subject.of(key)) or self.failures.get(Subject("", key.target), "")

    @property
    def setting(self) -> dict[str, object]:
        """The machine with the file system of each target's backing, in which runs of one course do not differ."""
        backings = {f"backing of {key.target}": names.get("backing") for key, names in self.conditions.items()}
        return {**self.machine, **backings}

    def without(self, facts: Collection[str]) -> Recorded:
        """The same, as if nobody knew these facts of the machine."""
        return replace(self, machine={name: value for name, value in self.machine.items() if name not in facts})


def read(file: Path) -> Recorded:
    """Read a run file. Raises `InvalidArgument` where it is none, or of a later format."""
    return parse(document(file), str(file))


def document(file: Path) -> Any:
    """What a JSON file holds. Raises `InvalidArgument` where it is none."""
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise refused(f"reading the run file {str(file)!r}", error, "name one that `layerfs bench` wrote") from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{str(file)!r} is not a run file: {error}") from error


def differences(base: Mapping[str, object], head: Mapping[str, object]) -> list[str]:
    """In what two `Recorded.machine`, or conditions, are not the same, so that figures of the two do not compare.

    What only one of them tells is no difference: versions tell more and more.
    """
    return [
        f"{name} {base[name]!r} and {head[name]!r}" for name in sorted({*base} & {*head}) if base[name] != head[name]
    ]


def unlike(base: Recorded, head: Recorded) -> dict[Subject, list[str]]:
    """What both have but measured differently, and in which conditions."""
    both = [subject for subject in base.conditions if subject in head.conditions]
    found = {subject: differences(base.conditions[subject], head.conditions[subject]) for subject in both}
    return {subject: names for subject, names in found.items() if names}


def parse(document: Any, name: str) -> Recorded:
    """The same from the document itself."""
    try:
        own = document["layerfs"]
        if own["format"] > runfile.FORMAT:
            raise InvalidArgument(f"the run file {name!r} was written by a later version of layerfs; use that one")
        datetime.fromisoformat(document["datetime"])
        parts: dict[str, _Part] = {}
        unsized = {work for work, kind in workload.discover().items() if not kind.sized}
        for benchmark in _list(document["benchmarks"]):
            extra, data = benchmark["extra_info"], samples(benchmark)
            label, target = extra["label"], extra["target"]
            states = _states(extra.get("cache", ()), len(data))
            for state in dict.fromkeys(states):
                part = parts.setdefault(state, _Part())
                taken = [one == state for one in states]
                times, processor = (list(map(quantity, _of(taken, some))) for some in (data, extra["processor"]))
                latencies = [
                    {quantity(t): int(number) for t, number in some} for some in _of(taken, extra["latencies"])
                ]
                found = figures.figures(extra["step"], times, processor, latencies)
                part.seconds |= {Key(label, step, target): values for step, values in found.items()}
                for counter, values in extra["counters"].items():
                    counted = [int(quantity(value)) for value in _of(taken, values)]
                    part.counters[CounterKey(label, counter, target)] = counted
                part.conditions[Subject(label, target)] = _conditions(benchmark, own["fingerprint"], unsized, state)
        thresholds = {Key(*key): part for key, part in calibration.thresholds(own["calibration"]).items()}
        failures = {Subject("", target): str(reason) for target, reason in own.get("left_out", {}).items()}
        for failure in own.get("failures", ()):
            failures[Subject(failure["workload"], failure["target"])] = str(failure["reason"])
        machine = dict(own["fingerprint"]["machine"])
        common = Recorded(name, machine, {}, {}, thresholds, own["warnings"], {}, failures)
        return together([common, *(replace(common, **vars(part)) for part in parts.values())], name)
    except NOT_A_RUN as error:
        raise no_run(name, error) from error


NOT_A_RUN = (KeyError, TypeError, AttributeError, ValueError, IndexError)
"""What reading fields of a document raises that is no run file."""


def no_run(name: str, error: Exception) -> InvalidArgument:
    """What to raise for one of `NOT_A_RUN`."""
    fault = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return InvalidArgument(f"{name!r} is not a run file of `layerfs bench`: {fault}")


def samples(benchmark: Any) -> list[float]:
    """Seconds of every sample. Raises one of `NOT_A_RUN` where they are not whole."""
    seconds = [quantity(value) for value in benchmark["stats"]["data"]]
    if not seconds or any(len(benchmark["extra_info"][name]) != len(seconds) for name in ("bytes", "operations")):
        raise ValueError("samples are missing")
    if not all(seconds):
        raise ValueError("something took no time at all")
    quantity(benchmark["params"]["size"])
    return seconds


def quantity(value: Any) -> float:
    """A figure, of which JSON as Python reads it has NaN and Infinity, too. Raises `ValueError` for no figure."""
    found = float(value)
    if not math.isfinite(found) or not 0 <= found <= _MOST:
        raise ValueError(f"{value!r} is no figure")
    return found


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a list is wanted where there is {type(value).__name__}")
    return value


def taken(run: Run, name: str) -> Recorded:
    """The same from a run that has just been measured."""
    seconds: dict[Key, list[float]] = {}
    counters: dict[CounterKey, list[int]] = {}
    for series in run.series():
        label, target = series.workload.label, series.target
        seconds |= {Key(label, name, target): values for name, values in series.figures.items()}
        counters |= {CounterKey(label, counter, target): values for counter, values in series.counters.items()}
    noises = {Key(n.workload, n.step, n.target): n.threshold for n in calibration.measured(run)}
    return Recorded(name, {}, seconds, counters, noises, run.warnings)


@dataclass
class _Part:
    """What a run file has in one cache state."""

    seconds: dict[Key, list[float]] = field(default_factory=dict)
    counters: dict[CounterKey, list[int]] = field(default_factory=dict)
    conditions: dict[Subject, Mapping[str, object]] = field(default_factory=dict)


def together(runs: Sequence[Recorded], name: str) -> Recorded:
    """The samples of several runs of the same thing, in their order.

    Samples that were taken in other conditions than most of the same subject are left out, which a warning says.
    """
    usual = {subject: _usual(subject, runs) for subject in dict.fromkeys(s for run in runs for s in run.conditions)}
    warnings = [warning for run in runs for warning in run.warnings]
    alike = []
    for run in runs:
        unlike = {s: "; ".join(found) for s, own in run.conditions.items() if (found := differences(usual[s], own))}
        warnings += [f"{s.workload} on {s.target}: left out are samples with {why}" for s, why in unlike.items()]
        seconds = {key: times for key, times in run.seconds.items() if Subject.of(key) not in unlike}
        counters = {key: values for key, values in run.counters.items() if Subject.of(key) not in unlike}
        alike.append((seconds, counters))
    return replace(
        runs[0],
        name=name,
        seconds=_gathered(samples for seconds, _ in alike for samples in seconds.items()),
        counters=_gathered(samples for _, counters in alike for samples in counters.items()),
        warnings=list(dict.fromkeys(warnings)),
        conditions=usual,
        failures={key: reason for run in runs for key, reason in run.failures.items()},
    )


def _usual(subject: Subject, runs: Sequence[Recorded]) -> Mapping[str, object]:
    """The conditions that most of a subject's samples have."""
    found: list[Mapping[str, object]] = []
    for run in runs:
        if subject in run.conditions:
            samples = max((len(times) for key, times in run.seconds.items() if Subject.of(key) == subject), default=0)
            found += [run.conditions[subject]] * samples
    return max(found, key=found.count)


def _gathered(samples: Iterable[tuple[_K, Sequence[_V]]]) -> dict[_K, list[_V]]:
    found: dict[_K, list[_V]] = {}
    for key, values in samples:
        found.setdefault(key, []).extend(values)
    return found


def _of_first(key: _AnyKey) -> _AnyKey:
    return key._replace(target=first_of_pair(key.target) or key.target)


def _states(caches: Sequence[Mapping[str, Any]], samples: int) -> list[str]:
    """Of every sample, the cache's state and how it was reached."""
    found = [f"{c['asked']} by {c['how']}{'' if c['as_asked'] else ', not reached'}" for c in caches]
    return found if len(found) == samples else [" and ".join(sorted(set(found))) or "any"] * samples


def _of(taken: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    """The values of some samples; all, where nobody knows whose they are."""
    return list(itertools.compress(values, taken)) if len(values) == len(taken) else list(values)


def _conditions(benchmark: Any, fingerprint: Any, unsized: Collection[str], cache: str) -> dict[str, object]:
    """Of a figure: parameters with the size, the cache's state and how it was reached, the backing, and the user."""
    extra = benchmark["extra_info"]
    meaningless = {"target", "size"} if extra["workload"] in unsized else {"target"}
    return {
        **{name: value for name, value in benchmark["params"].items() if name not in meaningless},
        "cache": cache,
        "backing": fingerprint["targets"][extra["target"]]["backing"].get("filesystem"),
        **({"user": fingerprint["user"]} if "user" in fingerprint else {}),
    }
