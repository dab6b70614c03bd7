"""Reading a file of a lower layer in random order."""

from __future__ import annotations

from dataclasses import dataclass

from layerfs.bench import plain
from layerfs.bench.caches import CacheState
from layerfs.bench.on_lower import LowerReader
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing


@dataclass(frozen=True)
class Randread(LowerReader):
    """Buffered reads, one at a time, each from a place not read before: what finding a block costs."""

    name = "randread"
    summary = "read a thirty-second of a lower layer's file in random 4K blocks, with a cold cache"

    block: int = 4096
    part: int = 32
    state: CacheState = CacheState.COLD

    @property
    def misfit(self) -> str:
        return "" if self.block < self.size else "the file is one block, which has no random order"

    def measure(self, layer: Layer) -> list[Timing]:
        job = plain.Job("randread", self.block, self.size, self.seed, part=self.size // self.part)
        return [plain.run("read", self.files(layer), job)]
