"""Walking a tree of a lower layer, with the attributes of every file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
        with ThreadPoolExecutor(self.tasks) as pool:
            timings = []
            for step in ("first walk", "second walk"):
                clock = Stopwatch()
                seen = sum(pool.map(_walk, [layer.path] * self.tasks))
                timings.append(clock.lap(step, operations=seen))
            return timings


def _walk(root: Path) -> int:
    seen = 0
    for place, _, files in os.walk(root):
        for name in files:
            os.stat(os.path.join(place, name), follow_symlinks=False)
            seen += 1
    return seen
