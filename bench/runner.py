"""Taking the samples of a run: drivers and rounds interleaved in random order, each on a layer of its own."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import layerfs.guest
from layerfs.bench import caches, fingerprint
from layerfs.bench.caches import CacheState, Reached
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.results import Run, Sample
from layerfs.bench.scratch import Scratch
from layerfs.bench.target import Layer, Target
from layerfs.bench.workload import Workload
from layerfs.errors import EnvironmentUnfit, InvalidArgument, LayerfsError, OutOfSpace
from layerfs.sizes import format_size

MINIMUM_SIZE = 1 << 20
ROUNDS = 5
_FEWEST_ROUNDS = 3
_SECONDS_PER_TARGET = 110
_MARGIN = 256 << 20  # journals, metadata and freed space that the backing has not given back yet
_BY_ADVICE = (
    "files were made cold by posix_fadvise, because only root of the host may drop every cache: their inodes, and what "
    "a device below them keeps, may have stayed"
)


@dataclass(frozen=True)
class Plan:
    """What a run shall measure.

    Attributes:
        drivers: their names, the first being what others are compared with.
        workloads: with their parameters.
        size: bytes of the large file.
        rounds: samples of each workload on each driver; None for `ROUNDS`, or fewer if they take too long.
        seed: of every random choice.
        place: the directory to make scratch stores in.
        filesystem: of the backing; None for what each driver's store takes by itself.
    """

    drivers: Sequence[str]
    workloads: Sequence[Workload]
    size: int
    rounds: int | None
    seed: int
    place: Path
    filesystem: str | None = None

    @property
    def space(self) -> int:
        """Bytes that `place` has to have free: every driver's bases, and the largest sample on a full copy."""
        bases = {work.base.key: work.base.size for work in self.workloads if work.base}
        largest = max((work.base.size if work.base else 0) + work.writes for work in self.workloads)
        return len(self.drivers) * (sum(bases.values()) + largest + _MARGIN)

    @property
    def backing_size(self) -> int:
        """Bytes of a backing that is made for one driver; roomy, because file systems slow down when they fill up."""
        return 3 * self.space // len(self.drivers)


Progress = Callable[[str, float], None]
"""Called with what is being done and the part of the whole that is done, 0 to 1."""


def run(plan: Plan, interrupts: Interrupts, progress: Progress = lambda _text, _part: None) -> Run:
    """Take every sample of ``plan`` and leave nothing behind.

    Raises `InvalidArgument`, `EnvironmentUnfit` or `OutOfSpace` before anything is made if the plan cannot work here,
    what the layers raise while it does, and KeyboardInterrupt where ``interrupts`` saw a signal.
    """
    _check(plan)
    started, notes = datetime.now(UTC), _conditions(plan.place)
    with Scratch(plan.place, interrupts) as scratch:
        for work in plan.workloads:
            with interrupts.allowed():
                work.prepare(scratch.shared)
        targets = [scratch.target(name, plan.filesystem, plan.backing_size) for name in plan.drivers]
        _build(plan, targets, progress)
        samples = list(_samples(plan, targets, scratch.shared, interrupts, progress))
        facts = fingerprint.take(plan.place, {target.name: target.facts() for target in targets})
    return Run(started, plan.size, plan.seed, plan.drivers, samples, facts, [*notes, *_cache_notes(samples)])


def _check(plan: Plan) -> None:
    if plan.size < MINIMUM_SIZE:
        raise InvalidArgument(f"--size {format_size(plan.size)} is too small to measure; give at least 1M")
    for program in sorted({program for work in plan.workloads for program in work.programs}):
        if not shutil.which(program):
            raise EnvironmentUnfit(f"{program}, which some workloads run, was not found; install the package {program}")
    try:
        free = shutil.disk_usage(plan.place).free
    except OSError as error:
        raise InvalidArgument(f"the scratch directory {str(plan.place)!r}: {error.strerror}") from error
    if free < plan.space:
        raise OutOfSpace(
            f"measuring {', '.join(plan.drivers)} at this size needs {format_size(plan.space)} at {str(plan.place)!r}, "
            f"which has {format_size(free)} free; choose a smaller --size, fewer drivers or another --scratch"
        )


def _build(plan: Plan, targets: Sequence[Target], progress: Progress) -> None:
    bases = {work.base.key: work.base for work in plan.workloads if work.base}
    for target in targets:
        for base in bases.values():
            progress(f"base layer on {target.name}", 0.0)
            target.build(base)


def _samples(
    plan: Plan, targets: Sequence[Target], shared: Path, interrupts: Interrupts, progress: Progress
) -> Iterator[Sample]:
    """Rounds of blocks: a block is one workload on every target, close in time, so that slow drifts hit all alike."""
    order = random.Random(plan.seed)  # noqa: S311
    rounds = plan.rounds or ROUNDS
    each = len(plan.workloads) * len(targets)
    begin, done = time.monotonic(), 0
    for number in range(rounds):
        if plan.rounds is None and number >= _FEWEST_ROUNDS and not _time_left(begin, number, len(targets)):
            return
        for work in order.sample(plan.workloads, len(plan.workloads)):
            for target in order.sample(targets, len(targets)):
                progress(f"round {number + 1} of {rounds}: {work.label} on {target.name}", done / (rounds * each))
                yield _sample(work, target, number, shared, interrupts)
                done += 1


def _time_left(begin: float, rounds: int, targets: int) -> bool:
    """Whether one more round as long as the others fits."""
    spent = time.monotonic() - begin
    return spent + spent / rounds <= _SECONDS_PER_TARGET * targets


def _sample(work: Workload, target: Target, number: int, shared: Path, interrupts: Interrupts) -> Sample:
    try:
        with target.fresh(work.base, shared, mounted=work.mounted) as layer:
            try:
                with interrupts.allowed():
                    work.set_up(layer)
                    reached = _settled(work, layer)
                    timings = work.measure(layer)
                return Sample(target.name, work, number, timings, work.counters(layer), reached)
            finally:
                work.tear_down(layer)
    except LayerfsError as error:
        error.args = (f"measuring {work.label} on {target.name}: {error}",)
        raise
    except OSError as error:
        raise LayerfsError(f"measuring {work.label} on {target.name}: {error.strerror or error}") from error


def _settled(work: Workload, layer: Layer) -> Reached | None:
    """Nothing is left to be written, and the file that is read is in the cache state that the workload names."""
    caches.write_back(*([layer.tree] if layer.tree else []), layer.shared)
    if work.cache is CacheState.ANY:
        return None
    return caches.establish(work.cache, layer.path / work.reads)


def _conditions(place: Path) -> list[str]:
    """What makes this host, as it is now, a poor place to measure on."""
    notes = []
    if guest := layerfs.guest.here():
        notes.append(f"measured in a guest ({guest.kind}): compare these figures only with others of such a guest")
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cpus / 2:
        notes.append(f"other work was running (a load of {load:.1f} on {cpus} processors), which blurs every figure")
    disk = fingerprint.storage(place)
    if disk.get("filesystem") in ("tmpfs", "ramfs"):
        notes.append(
            f"{str(place)!r} lies in memory: no figure here says anything of a disk; --scratch chooses another"
        )
    use = shutil.disk_usage(place)
    if use.free < use.total / 10:
        notes.append(f"the disk of {str(place)!r} is nearly full, which makes file systems slow")
    return notes


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
