"""Taking the samples of a run: drivers and rounds interleaved in random order, each on a layer of its own."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from layerfs.backing import DIRECTORY
from layerfs.bench import caches, fingerprint, memory
from layerfs.bench.caches import CacheState, Reached
from layerfs.bench.content import Base
from layerfs.bench.fitness import Watch
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.journal import Journal
from layerfs.bench.native import NATIVE
from layerfs.bench.results import Failure, Run, Sample, split
from layerfs.bench.scratch import Device, Scratch, StoreTarget
from layerfs.bench.statistics import median
from layerfs.bench.target import Layer, Target
from layerfs.bench.workload import Workload
from layerfs.errors import EnvironmentUnfit, InvalidArgument, LayerfsError, OutOfSpace
from layerfs.sizes import format_size

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
        device: what the backing is made on, for one driver and the native control; None for sparse files in ``place``.
        precision: half of an interval's width, as a part of the median, that is narrow enough.
        seconds: after which nothing is repeated that has the fewest rounds; None for no limit.
        memory: bytes that this process and its page cache may have; None for no cap.
        fewest: rounds that every workload gets, where their number is not given.
        measured_on: by a workload's label, the targets that it is measured on; what is not in it, on all.
        goes_on: whether work that fails on a target is left out there from then on, instead of ending the run.
    """

    targets: Sequence[str]
    workloads: Sequence[Workload]
    size: int
    rounds: int | None
    seed: int
    place: Path
    filesystem: str | None = None
    device: Device | None = None
    precision: float = 0.05
    seconds: float | None = None
    memory: int | None = None
    fewest: int = FEWEST_ROUNDS
    measured_on: Mapping[str, Collection[str]] = field(default_factory=dict)
    goes_on: bool = False

    @property
    def space(self) -> int:
        """Bytes to be free at `place` or on `device`: every target's bases, and the largest sample on a full copy."""
        return sum(map(self._space_of, self.targets))

    @property
    def backing_size(self) -> int:
        """Bytes of a backing that is made for one target; roomy, because file systems slow down when they fill up."""
        return 3 * max(map(self._space_of, self.targets))

    def wants(self, work: Workload, target: str) -> bool:
        """Whether the workload is to be measured on the target of that name."""
        return target in self.measured_on.get(work.label, self.targets)

    def _space_of(self, target: str) -> int:
        works = [work for work in self.workloads if self.wants(work, target)]
        bases = {work.base.key: work.base.size for work in works}
        largest = max((work.base.size + work.writes for work in works), default=0)
        return sum(bases.values()) + largest + _MARGIN

    @property
    def identity(self) -> dict[str, object]:
        """What a run that goes on with this one's samples must have in common with it."""
        works = [{"label": work.label, **work.parameters, "size": work.size} for work in self.workloads]
        return {
            "seed": self.seed,
            "targets": list(self.targets),
            "workloads": works,
            "filesystem": self.filesystem,
            "memory": self.memory,
            "place": str(self.place),
            **({"device": self.device.path} if self.device else {}),
            **({"measured on": {k: sorted(v) for k, v in self.measured_on.items()}} if self.measured_on else {}),
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
    earlier = journal.samples(plan.workloads, fingerprint.circumstances(plan.place)) if journal else []
    direct = plan.device is None and plan.filesystem in (None, DIRECTORY)
    started, watch = datetime.now(UTC), Watch(plan.place, direct=direct)
    with Scratch(plan.place, interrupts, kinds, plan.device) as scratch, memory.capped(plan.memory):
        for work in plan.workloads:
            with interrupts.allowed():
                work.prepare(scratch.shared)
        failed = _Failed(plan.goes_on)
        targets = []
        # On a device, the bare directory is made beside the driver's store, which has to be there.
        for name in sorted(plan.targets, key=lambda name: plan.device is not None and name == NATIVE):
            with failed.noted(name, once=False):
                targets.append(scratch.target(name, plan.filesystem, plan.backing_size))
        failed.note_limits(plan, targets)
        _build(plan, targets, failed, progress)
        samples = list(earlier)
        for sample in _samples(plan, targets, scratch.shared, interrupts, progress, earlier, failed):
            samples.append(sample)
            if journal:
                journal.add(sample)
        facts = {target.name: target.facts() for target in targets}
        circumstances = fingerprint.take(plan.place, facts)
    notes = [*watch.notes(), *_cache_notes(samples, facts)]
    if earlier:
        notes.append(f"the run was stopped and went on: {len(earlier)} of its {len(samples)} samples are older")
    return Run(started, plan.size, plan.seed, plan.targets, samples, circumstances, notes, failed.failures)


class _Failed:
    """What failed on which target; failing again, it is left out there. Without ``goes_on`` every error passes."""

    def __init__(self, goes_on: bool) -> None:
        self._goes_on = goes_on
        self._once: set[tuple[str, str]] = set()
        self._left_out: set[tuple[str, str]] = set()
        self.failures: list[Failure] = []

    @contextmanager
    def noted(self, target: str, *works: Workload, once: bool = True) -> Iterator[None]:
        """Note what the body raises as the failure of these workloads there; of all, where none is named.

        What may fail ``once`` is tried a second time, for a sample can fail by what others do to the host.
        """
        try:
            yield
        except LayerfsError as error:
            if not self._goes_on:
                raise
            labels = [work.label for work in works] or [""]
            self.failures += [Failure(target, label, str(error)) for label in labels]
            self._left_out.update((target, label) for label in labels if not once or (target, label) in self._once)
            self._once.update((target, label) for label in labels)

    def note_limits(self, plan: Plan, targets: Sequence[Target]) -> None:
        """Leave out what wants more layers mounted at a time than a target can have."""
        for target in targets:
            for work in plan.workloads:
                if (
                    target.most_mounted is not None
                    and work.layers_at_once > target.most_mounted
                    and _measures(plan, target, work)
                ):
                    reason = f"it has no more than {target.most_mounted:,} layers mounted at a time"
                    self.failures.append(Failure(target.name, work.label, reason, known=True))
                    self._left_out.add((target.name, work.label))

    def has(self, work: Workload, target: str) -> bool:
        return not self._left_out.isdisjoint({(target, ""), (target, work.label)})


def _check(plan: Plan) -> None:
    if plan.memory is not None and plan.memory < memory.SMALLEST:
        raise InvalidArgument(f"--memory {format_size(plan.memory)}: give at least {format_size(memory.SMALLEST)}")
    for program in sorted({program for work in plan.workloads for program in work.programs}):
        if not shutil.which(program):
            raise EnvironmentUnfit(f"{program}, which some workloads run, was not found; install the package {program}")
    where = plan.device.path if plan.device else str(plan.place)
    try:
        free = _size(plan.device) if plan.device else shutil.disk_usage(plan.place).free
    except OSError as error:
        what = "device" if plan.device else "scratch directory"
        raise InvalidArgument(f"the {what} {where!r}: {error.strerror}") from error
    if free < plan.space:
        raise OutOfSpace(
            f"measuring {', '.join(plan.targets)} at this size needs {format_size(plan.space)} at {where!r}, which has "
            f"{format_size(free)} free; choose a smaller --size, fewer drivers or another place"
        )


def _size(device: Device) -> int:
    with open(device.path, "rb") as file:
        return file.seek(0, os.SEEK_END)


def _build(plan: Plan, targets: Sequence[Target], failed: _Failed, progress: Progress) -> None:
    for target in targets:
        bases: dict[str, tuple[Base, list[Workload]]] = {}
        for work in plan.workloads:
            if _measures(plan, target, work):
                bases.setdefault(work.base.key, (work.base, []))[1].append(work)
        for base, works in bases.values():
            progress(f"base layer on {target.name}", 0.0)
            with failed.noted(target.name, *works, once=False):
                target.build(base)


def _measures(plan: Plan, target: Target, work: Workload) -> bool:
    return (target.has_layers or not work.about_layers) and plan.wants(work, target.name)


def _samples(
    plan: Plan,
    targets: Sequence[Target],
    shared: Path,
    interrupts: Interrupts,
    progress: Progress,
    earlier: Sequence[Sample],
    failed: _Failed,
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
            block = [
                target
                for target in targets
                if _measures(plan, target, work) and target.name not in done and not failed.has(work, target.name)
            ]
            if number >= plan.fewest and not clock.has_time_for(work):
                active.remove(work)
                continue
            with clock.measuring(work):
                for target in order.sample(block, len(block)):
                    progress(f"round {number + 1}: {work.label} on {target.name}", clock.part(number, active))
                    with failed.noted(target.name, work):
                        one = take_sample(work, target, number, shared, interrupts)
                        taken[work.label].append(one)
                        yield one
        if plan.rounds is None:
            kept = {w.label: [s for s in taken[w.label] if not failed.has(w, s.target)] for w in active}
            active = [work for work in active if not _is_precise(kept[work.label], plan.precision)]
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
        if self._plan.rounds is None and self._plan.seconds is not None and number >= self._plan.fewest:
            return min(1.0, (time.monotonic() - self._begin) / self._plan.seconds)
        blocks = sum(map(len, self._blocks.values()))
        return min(1.0, blocks / max(1, len(active)) / (self._plan.rounds or _JUDGED_FROM))


def _is_precise(samples: Sequence[Sample], precision: float) -> bool:
    """Whether every interval of the workload is narrow enough; so is what is measured nowhere."""
    return all(len(one.seconds) >= _JUDGED_FROM and median(one.seconds).spread <= precision for one in split(samples))


def take_sample(work: Workload, target: Target, number: int, shared: Path, interrupts: Interrupts) -> Sample:
    """Measure ``work`` once, on a fresh layer of ``target``. Raises `LayerfsError`."""
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
    """Nothing is left to be written, and the files that are read are in the cache state that the workload names."""
    layer.target.write_back(*([layer.tree] if layer.tree else []), layer.shared)
    if work.state is CacheState.ANY:
        return None
    return caches.establish(work.state, *(layer.path / name for name in work.reads))


def _cache_notes(samples: Sequence[Sample], facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    by_advice = any(sample.cache and sample.cache.how == "fadvise" for sample in samples)
    notes = [_BY_ADVICE] if by_advice else []
    cold = {sample.target for sample in samples if sample.cache and sample.cache.asked is CacheState.COLD}
    if own := [name for name in facts if name in cold and facts[name]["backing"].get("filesystem") == "fuse.zfs"]:
        notes.append(f"on {', '.join(own)}, cold is the kernel's cache alone: zfs-fuse keeps some of what is read")
    missed = {
        f"{sample.workload.label} on {sample.target}: the cache was not {sample.cache.asked} but held "
        f"{sample.cache.resident:.0%} of the file (by {sample.cache.how})"
        for sample in samples
        if sample.cache and not sample.cache.as_asked
    }
    return [*notes, *sorted(missed)]
