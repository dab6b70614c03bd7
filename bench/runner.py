"""Taking the samples of a run: drivers and rounds interleaved in random order, each on a layer of its own."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from layerfs.bench import caches, fingerprint, memory
from layerfs.bench.caches import CacheState, Reached
from layerfs.bench.fitness import Watch
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.journal import Journal
from layerfs.bench.results import Run, Sample, split
from layerfs.bench.scratch import Scratch, StoreTarget
from layerfs.bench.statistics import median
from layerfs.bench.target import Layer, Target
from layerfs.bench.workload import Workload
from layerfs.errors import EnvironmentUnfit, InvalidArgument, LayerfsError, OutOfSpace
from layerfs.sizes import format_size

MINIMUM_SIZE = 1 << 20
FEWEST_ROUNDS, MOST_ROUNDS = 3, 50
"""Samples of each workload on each target, where their number is not given."""
_JUDGED_FROM = 5
"""Samples that an interval needs before it can be called narrow."""
_MARGIN = 256 << 20  # journals, metadata and freed space that the backing has not given back yet
_BY_ADVICE = (
    "files were made cold by posix_fadvise, because only root of the host may drop every cache: their inodes, and what "
    "a device below them keeps, may have stayed"
)


@dataclass(frozen=True)
class Plan:
    """What a run shall measure.

    Attributes:
        targets: their names, the first being what others are compared with (see `Scratch.target`).
        workloads: with their parameters.
        size: bytes of the largest large file.
        rounds: samples of each workload on each target; None for as many as ``precision`` takes.
        seed: of every random choice.
        place: the directory to make scratch stores in.
        filesystem: of the backing; None for what each driver's store takes by itself.
        precision: half of an interval's width, as a part of the median, that is narrow enough.
        seconds: after which nothing is repeated that has the fewest rounds; None for no limit.
        memory: bytes that this process and its page cache may have; None for no cap.
    """

    targets: Sequence[str]
    workloads: Sequence[Workload]
    size: int
    rounds: int | None
    seed: int
    place: Path
    filesystem: str | None = None
    precision: float = 0.05
    seconds: float | None = None
    memory: int | None = None

    @property
    def space(self) -> int:
        """Bytes that `place` has to have free: every target's bases, and the largest sample on a full copy."""
        bases = {work.base.key: work.base.size for work in self.workloads if work.base}
        largest = max((work.base.size if work.base else 0) + work.writes for work in self.workloads)
        return len(self.targets) * (sum(bases.values()) + largest + _MARGIN)

    @property
    def backing_size(self) -> int:
        """Bytes of a backing that is made for one target; roomy, because file systems slow down when they fill up."""
        return 3 * self.space // len(self.targets)

    @property
    def identity(self) -> dict[str, object]:
        """What a run that goes on with this one's samples must have in common with it."""
        works = [{"label": work.label, **work.parameters, "size": work.size} for work in self.workloads]
        return {
            "targets": list(self.targets),
            "workloads": works,
            "filesystem": self.filesystem,
            "memory": self.memory,
            "place": str(self.place),
        }


Progress = Callable[[str, float], None]
"""Called with what is being done and the part of the whole that is done, 0 to 1."""


def run(
    plan: Plan,
    interrupts: Interrupts,
    progress: Progress = lambda _text, _part: None,
    journal: Journal | None = None,
    kinds: Mapping[str, type[StoreTarget]] = MappingProxyType({}),
) -> Run:
    """Take every sample of ``plan`` and leave nothing behind, but for ``journal`` what that needs to go on.

    Args:
        kinds: see `Scratch`.

    Raises `InvalidArgument`, `EnvironmentUnfit` or `OutOfSpace` before anything is made if the plan cannot work here,
    what the layers raise while it does, and KeyboardInterrupt where ``interrupts`` saw a signal.
    """
    _check(plan)
    earlier = journal.samples(plan.workloads) if journal else []
    started, watch = datetime.now(UTC), Watch(plan.place)
    with Scratch(plan.place, interrupts, kinds) as scratch, memory.capped(plan.memory):
        for work in plan.workloads:
            with interrupts.allowed():
                work.prepare(scratch.shared)
        targets = [scratch.target(name, plan.filesystem, plan.backing_size) for name in plan.targets]
        _build(plan, targets, progress)
        samples = list(earlier)
        for sample in _samples(plan, targets, scratch.shared, interrupts, progress, earlier):
            samples.append(sample)
            if journal:
                journal.add(sample)
        facts = fingerprint.take(plan.place, {target.name: target.facts() for target in targets})
    notes = [*watch.notes(), *_cache_notes(samples)]
    if earlier:
        notes.append(f"the run was stopped and went on: {len(earlier)} of its {len(samples)} samples are older")
    return Run(started, plan.size, plan.seed, plan.targets, samples, facts, notes)


def _check(plan: Plan) -> None:
    smallest = min(work.size for work in plan.workloads)
    if smallest < MINIMUM_SIZE:
        raise InvalidArgument(f"--size {format_size(smallest)} is too small to measure; give at least 1M")
    if plan.memory is not None and plan.memory < memory.SMALLEST:
        raise InvalidArgument(f"--memory {format_size(plan.memory)}: give at least {format_size(memory.SMALLEST)}")
    for program in sorted({program for work in plan.workloads for program in work.programs}):
        if not shutil.which(program):
            raise EnvironmentUnfit(f"{program}, which some workloads run, was not found; install the package {program}")
    try:
        free = shutil.disk_usage(plan.place).free
    except OSError as error:
        raise InvalidArgument(f"the scratch directory {str(plan.place)!r}: {error.strerror}") from error
    if free < plan.space:
        raise OutOfSpace(
            f"measuring {', '.join(plan.targets)} at this size needs {format_size(plan.space)} at {str(plan.place)!r}, "
            f"which has {format_size(free)} free; choose a smaller --size, fewer drivers or another --scratch"
        )


def _build(plan: Plan, targets: Sequence[Target], progress: Progress) -> None:
    for target in targets:
        bases = {work.base.key: work.base for work in plan.workloads if work.base and _measures(target, work)}
        for base in bases.values():
            progress(f"base layer on {target.name}", 0.0)
            target.build(base)


def _measures(target: Target, work: Workload) -> bool:
    return target.has_layers or not work.about_layers


def _samples(
    plan: Plan,
    targets: Sequence[Target],
    shared: Path,
    interrupts: Interrupts,
    progress: Progress,
    earlier: Sequence[Sample],
) -> Iterator[Sample]:
    """Rounds of blocks: a block is one workload on every target, close in time, so that slow drifts hit all alike."""
    order = random.Random(plan.seed)  # noqa: S311
    taken: dict[str, list[Sample]] = {work.label: [] for work in plan.workloads}
    for sample in earlier:
        taken[sample.workload.label].append(sample)
    clock = _Clock(plan)
    active = list(plan.workloads)
    for number in range(plan.rounds or MOST_ROUNDS):
        for work in order.sample(active, len(active)):
            done = {sample.target for sample in taken[work.label] if sample.round == number}
            block = [target for target in targets if _measures(target, work) and target.name not in done]
            if number >= FEWEST_ROUNDS and not clock.has_time_for(work):
                active.remove(work)
                continue
            with clock.measuring(work):
                for target in order.sample(block, len(block)):
                    progress(f"round {number + 1}: {work.label} on {target.name}", clock.part(number, active))
                    sample = _sample(work, target, number, shared, interrupts)
                    taken[work.label].append(sample)
                    yield sample
        if plan.rounds is None:
            active = [work for work in active if not _is_precise(taken[work.label], plan.precision)]
        if not active:
            return


class _Clock:
    """Whether there is time for one more block, by how long the workload's blocks took so far."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._begin = time.monotonic()
        self._blocks: dict[str, list[float]] = {}

    @contextmanager
    def measuring(self, work: Workload) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._blocks.setdefault(work.label, []).append(time.monotonic() - begin)

    def has_time_for(self, work: Workload) -> bool:
        if self._plan.seconds is None or self._plan.rounds is not None:
            return True
        expected = statistics.mean(self._blocks.get(work.label, [0.0]))
        return time.monotonic() - self._begin + expected <= self._plan.seconds

    def part(self, number: int, active: Sequence[Workload]) -> float:
        """Of the whole that is done, as far as it can be told: 0 to 1."""
        if self._plan.rounds is None and self._plan.seconds is not None and number >= FEWEST_ROUNDS:
            return min(1.0, (time.monotonic() - self._begin) / self._plan.seconds)
        blocks = sum(map(len, self._blocks.values()))
        return min(1.0, blocks / max(1, len(active)) / (self._plan.rounds or _JUDGED_FROM))


def _is_precise(samples: Sequence[Sample], precision: float) -> bool:
    """Whether every interval of the workload is narrow enough."""
    series = split(samples)
    return bool(series) and all(
        len(one.seconds) >= _JUDGED_FROM and median(one.seconds).spread <= precision for one in series
    )


def _sample(work: Workload, target: Target, number: int, shared: Path, interrupts: Interrupts) -> Sample:
    try:
        with target.fresh(work.base, shared, mounted=work.mounted) as layer:
            try:
                with interrupts.allowed():
                    work.set_up(layer)
                    reached = settle(work, layer)
                    timings = work.measure(layer)
                return Sample(target.name, work, number, timings, work.counters(layer), reached)
            finally:
                work.tear_down(layer)
    except LayerfsError as error:
        error.args = (f"measuring {work.label} on {target.name}: {error}",)
        raise
    except OSError as error:
        raise LayerfsError(f"measuring {work.label} on {target.name}: {error.strerror or error}") from error


def settle(work: Workload, layer: Layer) -> Reached | None:
    """Nothing is left to be written, and the file that is read is in the cache state that the workload names."""
    caches.write_back(*([layer.tree] if layer.tree else []), layer.shared)
    if work.cache is CacheState.ANY:
        return None
    return caches.establish(work.cache, layer.path / work.reads)


def _cache_notes(samples: Sequence[Sample]) -> list[str]:
    by_advice = any(sample.cache and sample.cache.how == "fadvise" for sample in samples)
    notes = [_BY_ADVICE] if by_advice else []
    missed = {
        f"{sample.workload.label} on {sample.target}: the cache was not {sample.cache.asked} but held "
        f"{sample.cache.resident:.0%} of the file (by {sample.cache.how})"
        for sample in samples
        if sample.cache and not sample.cache.as_asked
    }
    return [*notes, *sorted(missed)]
