"""Reading a file of a lower layer in random order."""

from __future__ import annotations

from dataclasses import dataclass

from layerfs.bench import fio
from layerfs.bench.caches import CacheState
from layerfs.bench.content import LOWER_FILE
from layerfs.bench.lower_reader import LowerReader
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
    def cache(self) -> CacheState:
        return self.state

    def measure(self, layer: Layer) -> list[Timing]:
        amount = max(self.size // self.part, self.block)
        done = fio.run(layer.path / LOWER_FILE, "randread", self.block, self.size, seed=self.seed, io_size=amount)
        return [
            Timing("read", done.seconds, operations=done.operations, latencies=done.latencies, processor=done.processor)
        ]
