"""Walking a tree of a lower layer, with the attributes of every file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench import tasks
from layerfs.bench.caches import CacheState
from layerfs.bench.on_lower import OnSmallFiles
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing


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
        with tasks.ready("walk", layer.path, [[]] * self.tasks) as walkers:
            return [walkers.do(step) for step in ("first walk", "second walk")]
