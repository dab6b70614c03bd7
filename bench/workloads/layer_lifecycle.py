"""Making, mounting, unmounting and removing layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from layerfs.bench.content import Base, small_files, write_random
from layerfs.bench.target import Layer, Target
from layerfs.bench.workload import Stopwatch, Timing, Workload, repeated


@dataclass(frozen=True)
class LayerLifecycle(Workload):
    """What a container's start and stop cost the storage, over a parent of 500 small files.

    Space that is in use in the end and was not at the beginning is counted: what removing has left. With ``written``
    bytes written into each layer, so is what the disk holds: space that the backing has not given back.
    """

    name = "layer-lifecycle"
    summary = "make, mount, unmount and remove a layer over a small parent, many times, each step apart"
    sized = False
    mounted = False
    about_layers = True

    repetitions: int = 20
    files: int = 500
    parent_size: int = 8 << 20
    written: int = 0

    @property
    def base(self) -> Base:
        return small_files(self.files, self.parent_size, self.seed)

    @property
    def writes(self) -> int:
        return self.parent_size + self.repetitions * self.written

    def measure(self, layer: Layer) -> list[Timing]:
        target, key = layer.target, self._key(layer)
        before = self._space(target)
        trees: list[Path] = []
        write: dict[str, Callable[[], object]] = {"write": lambda: self._write(trees[-1])}
        steps: dict[str, Callable[[], object]] = {
            "create": lambda: target.create(key, self.base),
            "mount": lambda: trees.append(target.mount(key)),
            **(write if self.written else {}),
            "unmount": lambda: target.unmount(key),
            "remove": lambda: target.remove(key),
        }
        taken: dict[str, list[Timing]] = {step: [] for step in steps}
        for _ in range(self.repetitions):
            for step, action in steps.items():
                clock = Stopwatch()
                action()
                taken[step].append(clock.lap(step))
        after = self._space(target)
        self._left[layer.key] = {name: max(0, after[name] - before[name]) for name in after}
        return [repeated(timings) for timings in taken.values()]

    def counters(self, layer: Layer) -> dict[str, int]:
        return self._left.pop(layer.key)

    def tear_down(self, layer: Layer) -> None:
        layer.target.discard(self._key(layer))

    def _write(self, root: Path) -> None:
        write_random(root / "written.dat", self.written, self.seed)

    def _space(self, target: Target) -> dict[str, int]:
        used = {"bytes left in use": target.used()}
        return {**used, "bytes left on disk": target.held()} if self.written else used

    _left: ClassVar[dict[str, dict[str, int]]] = {}

    @staticmethod
    def _key(layer: Layer) -> str:
        return f"{layer.key} repeated"
