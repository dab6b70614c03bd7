"""Walking a tree of a lower layer, with the attributes of every file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO, ClassVar

from layerfs.bench import walker
from layerfs.bench.caches import CacheState
from layerfs.bench.on_lower import OnSmallFiles
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing
from layerfs.errors import LayerfsError


@dataclass(frozen=True)
class TreeWalk(OnSmallFiles):
    """The first walk fills the kernel's cache of names and inodes, the second one finds them there.

    Each task is a process of its own and walks all of the tree; all are ready when the clock starts.
    """

    name = "tree-walk"
    summary = "walk a lower layer's tree of two thousand files twice and stat each, by one task or several"
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"tasks": (1, 10, 100)}

    files: int = 2000
    tasks: int = 1
    state: CacheState = CacheState.COLD

    @property
    def writes(self) -> int:
        return 0

    def measure(self, layer: Layer) -> list[Timing]:
        timings = []
        with _walkers(layer.path, self.tasks) as walkers:
            for step in ("first walk", "second walk"):
                clock = Stopwatch()
                for one in walkers:
                    _stream(one.stdin).write("\n")
                    _stream(one.stdin).flush()
                answers = [_answer(one) for one in walkers]
                timing = clock.lap(step, operations=sum(int(seen) for seen, _ in answers))
                used = timing.processor + sum(float(processor) for _, processor in answers)
                timings.append(dataclasses.replace(timing, processor=used))
        return timings


@contextmanager
def _walkers(root: Path, tasks: int) -> Iterator[list[Popen[str]]]:
    """As many processes, all ready to walk: threads of this one would wait for each other, and not for the driver.

    They are in sessions of their own, for a terminal's Ctrl-C is this process's alone; they end with their input.
    """
    command = [sys.executable, "-I", "-S", walker.__file__, str(root)]
    with ExitStack() as stack:
        walkers = []
        for _ in range(tasks):
            one = Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True)
            stack.enter_context(one)
            stack.callback(one.kill)  # before it is waited for; nothing that it does is of use any more
            walkers.append(one)
        for one in walkers:
            _answer(one)
        yield walkers


def _answer(walker: Popen[str]) -> list[str]:
    line = _stream(walker.stdout).readline()
    if not line:
        raise LayerfsError(f"walking a tree: {' '.join(_stream(walker.stderr).read().split())}")
    return line.split()


def _stream(given: IO[str] | None) -> IO[str]:
    assert given is not None  # all three are pipes
    return given
