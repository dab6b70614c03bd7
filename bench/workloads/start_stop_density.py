"""Many layers at once: making and mounting them, one or a few at a time, and taking them down again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench.content import Base, small_files
from layerfs.bench.crowd import at_once
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class StartStopDensity(Workload):
    """What it costs that others are there already, or are made at the same time: the rate over the whole ramp, how long
    each layer took, which grows where they wait for each other, and space for each layer.
    """

    name = "start-stop-density"
    summary = "make and mount many layers on one parent, all at once mounted, then unmount and remove them"
    sized = False
    mounted = False
    about_layers = True
    sweep: ClassVar[Mapping[str, Sequence[object]]] = {"tasks": (1, 8)}
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"layers": (20, 100, 1000)}

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

    @property
    def layers_at_once(self) -> int:
        return self.layers

    def measure(self, layer: Layer) -> list[Timing]:
        target, keys = layer.target, self._keys(layer)

        def start(key: str) -> None:
            target.create(key, self.base)
            target.mount(key)

        def stop(key: str) -> None:
            target.unmount(key)
            target.remove(key)

        up = self._all("up", start, keys)
        self._sizes[layer.key] = target.occupied(keys[-1])
        return [up, self._all("down", stop, keys)]

    def _all(self, step: str, work: Callable[[str], None], keys: Sequence[str]) -> Timing:
        done: list[float] = []
        latencies: list[float] = []

        def clocked(key: str) -> None:
            begin = clock.so_far
            work(key)
            end = clock.so_far
            done.append(end)
            latencies.append(end - begin)

        clock = Stopwatch()
        at_once(clocked, keys, self.tasks)
        return clock.lap(step, operations=self.layers, latencies=Counter(latencies), course=done)

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes of one layer": self._sizes.pop(layer.key)}

    def tear_down(self, layer: Layer) -> None:
        for key in self._keys(layer):
            layer.target.discard(key)

    def _keys(self, layer: Layer) -> list[str]:
        return [f"{layer.key} number {number}" for number in range(self.layers)]

    _sizes: ClassVar[dict[str, int]] = {}
