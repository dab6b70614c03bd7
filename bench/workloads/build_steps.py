"""Building an image: layer upon layer, each with a few changes, committed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from layerfs.bench.content import Base, small_files, write_random
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload, repeated


@dataclass(frozen=True)
class BuildSteps(Workload):
    """What ``docker build`` asks of the storage in each step; what the step itself computes is left out."""

    name = "build-steps"
    summary = "make, mount, change and commit layer upon layer over a parent of small files, as an image is built"
    sized = False
    mounted = False
    about_layers = True

    steps: int = 5
    files: int = 500
    parent_size: int = 8 << 20
    new_files: int = 20

    @property
    def base(self) -> Base:
        return small_files(self.files, self.parent_size, self.seed)

    @property
    def writes(self) -> int:
        return self.steps * 2 * self.parent_size

    def measure(self, layer: Layer) -> list[Timing]:
        target, parent = layer.target, self.base.key
        clock, commits = Stopwatch(), []
        for step, made in enumerate(self._keys(layer)):
            key = f"{made} in work"
            target.create(key, Base(parent, 0, self.base.fill))
            tree = target.mount(key)
            for number in range(self.new_files):
                seed = self.seed + step * self.new_files + number
                write_random(tree / f"{number}.dat", 4096, seed, durable=False)
            part = Stopwatch()
            target.commit(key, made)
            commits.append(part.lap("commit"))
            parent = made
        return [clock.lap("build", operations=self.steps), repeated(commits)]

    def tear_down(self, layer: Layer) -> None:
        for key in reversed(list(self._keys(layer))):
            layer.target.discard(f"{key} in work")
            layer.target.discard(key)

    def _keys(self, layer: Layer) -> Iterator[str]:
        return (f"{layer.key} step {number}" for number in range(self.steps))
