"""Making, mounting, unmounting and removing layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from layerfs.bench.content import Base, small_files
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class LayerLifecycle(Workload):
    """What a container's start and stop cost the storage, over a parent of 500 small files."""

    name = "layer-lifecycle"
    summary = "make, mount, unmount and remove a layer over a small parent, many times, each step apart"
    mounted = False
    about_layers = True

    repetitions: int = 20
    files: int = 500
    parent_size: int = 8 << 20

    @property
    def base(self) -> Base:
        return small_files(self.files, self.parent_size, self.seed)

    @property
    def writes(self) -> int:
        return self.parent_size

    def measure(self, layer: Layer) -> list[Timing]:
        target, key = layer.target, self._key(layer)
        steps: dict[str, Callable[[], object]] = {
            "create": lambda: target.create(key, self.base),
            "mount": lambda: target.mount(key),
            "unmount": lambda: target.unmount(key),
            "remove": lambda: target.remove(key),
        }
        taken: dict[str, list[Timing]] = {step: [] for step in steps}
        for _ in range(self.repetitions):
            for step, action in steps.items():
                clock = Stopwatch()
                action()
                taken[step].append(clock.lap(step))
        return [_median(step, timings) for step, timings in taken.items()]

    def tear_down(self, layer: Layer) -> None:
        layer.target.discard(self._key(layer))

    @staticmethod
    def _key(layer: Layer) -> str:
        return f"{layer.key} repeated"


def _median(step: str, timings: list[Timing]) -> Timing:
    seconds = [timing.seconds for timing in timings]
    return Timing(step, median(seconds), latencies=Counter(seconds), processor=median(t.processor for t in timings))
