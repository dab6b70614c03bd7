"""Many layers at once: making and mounting them, one or a few at a time, and taking them down again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench.content import Base, small_files
from layerfs.bench.crowd import at_once
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class StartStopDensity(Workload):
    """What it costs that others are there already: the rate over the whole ramp, and space for each layer."""

    name = "start-stop-density"
    summary = "make and mount many layers on one parent, all at once mounted, then unmount and remove them"
    sized = False
    mounted = False
    about_layers = True
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"layers": (20, 100, 1000), "tasks": (1, 8)}

    layers: int = 20
    tasks: int = 1
    files: int = 100
    parent_size: int = 1 << 20

    @property
    def base(self) -> Base:
        return small_files(self.files, self.parent_size, self.seed)

    @property
    def writes(self) -> int:
        return self.layers * 2 * self.parent_size

    def measure(self, layer: Layer) -> list[Timing]:
        target, keys = layer.target, self._keys(layer)
        risen: list[float] = []
        fallen: list[float] = []

        def start(key: str) -> None:
            target.create(key, self.base)
            target.mount(key)
            risen.append(clock.so_far)

        def stop(key: str) -> None:
            target.unmount(key)
            target.remove(key)
            fallen.append(clock.so_far)

        clock = Stopwatch()
        at_once(start, keys, self.tasks)
        up = clock.lap("up", operations=self.layers, course=risen)
        size = target.occupied(keys[-1])
        self._sizes[layer.key] = size
        clock = Stopwatch()
        at_once(stop, keys, self.tasks)
        return [up, clock.lap("down", operations=self.layers, course=fallen)]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes of one layer": self._sizes.pop(layer.key)}

    def tear_down(self, layer: Layer) -> None:
        for key in self._keys(layer):
            layer.target.discard(key)

    def _keys(self, layer: Layer) -> list[str]:
        return [f"{layer.key} number {number}" for number in range(self.layers)]

    _sizes: ClassVar[dict[str, int]] = {}
