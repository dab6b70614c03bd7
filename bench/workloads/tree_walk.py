"""Walking a tree of a lower layer, with the attributes of every file."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import ClassVar

from layerfs.bench.caches import CacheState
from layerfs.bench.content import Base, even_files, even_names
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class TreeWalk(Workload):
    """The first walk fills the kernel's cache of names and inodes, the second one finds them there."""

    name = "tree-walk"
    summary = "walk a lower layer's tree of two thousand files twice and stat each, by one task or several"
    sized = False
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"tasks": (1, 10, 100)}

    files: int = 2000
    tasks: int = 1
    state: CacheState = CacheState.COLD

    @property
    def base(self) -> Base:
        return even_files(self.files, 512, self.seed)

    @property
    def reads(self) -> list[str]:
        return even_names(self.files)

    @property
    def writes(self) -> int:
        return 0

    def measure(self, layer: Layer) -> list[Timing]:
        with _walkers(self.tasks) as walk:
            timings = []
            for step in ("first walk", "second walk"):
                clock = Stopwatch()
                timings.append(clock.lap(step, operations=walk(layer.path)))
            return timings


@contextmanager
def _walkers(tasks: int) -> Iterator[Callable[[Path], int]]:
    """What walks a tree by so many tasks at a time and counts the files they saw.

    Several are processes, since threads would wait for the interpreter's lock; all run before the first walk begins.
    """
    if tasks == 1:
        yield _walk
        return
    context = multiprocessing.get_context("forkserver")  # not a copy of this process, with its threads and handlers
    context.set_forkserver_preload([__name__])
    with context.Pool(tasks, _meet_at, [context.Barrier(tasks)]) as pool:

        def walk(root: Path) -> int:
            return sum(pool.map(_walk, [root] * tasks, chunksize=1))

        pool.map(_meet, range(tasks), chunksize=1)
        yield walk


_barrier: Barrier


def _meet_at(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603 - a worker's own
    _barrier = barrier


def _meet(_task: int) -> None:
    """Be in a process that takes no second task before every other has one."""
    _barrier.wait()


def _walk(root: Path) -> int:
    seen = 0
    for place, _, files in os.walk(root):
        for name in files:
            os.stat(os.path.join(place, name), follow_symlinks=False)
            seen += 1
    return seen
