"""Reading a file of a lower layer once more."""

from __future__ import annotations

from dataclasses import dataclass

from layerfs.bench import fio
from layerfs.bench.caches import CacheState
from layerfs.bench.content import LOWER_FILE, Base, lower_file
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing, Workload


@dataclass(frozen=True)
class Reread(Workload):
    """The first read begins cold and fills the cache as far as memory goes; the second one finds what is left there."""

    name = "reread"
    summary = "read a lower layer's file twice, the first time with a cold cache, each time apart"
    programs = ("fio",)

    block: int = 1 << 20

    @property
    def base(self) -> Base:
        return lower_file(self.size, self.seed)

    @property
    def writes(self) -> int:
        return 0

    @property
    def cache(self) -> CacheState:
        return CacheState.COLD

    @property
    def reads(self) -> str:
        return LOWER_FILE

    def measure(self, layer: Layer) -> list[Timing]:
        timings = []
        for step in ("first read", "second read"):
            done = fio.run(layer.path / LOWER_FILE, "read", self.block, self.size, seed=self.seed)
            timings.append(Timing(step, done.seconds, bytes=done.bytes, processor=done.processor))
        return timings
