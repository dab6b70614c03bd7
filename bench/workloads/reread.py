"""Reading a file of a lower layer once more."""

from __future__ import annotations

from dataclasses import dataclass

from layerfs.bench import plain
from layerfs.bench.on_lower import LowerReader
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing


@dataclass(frozen=True)
class Reread(LowerReader):
    """The first read begins cold and fills the cache as far as memory goes; the second one finds what is left there."""

    name = "reread"
    summary = "read a lower layer's file twice, the first time with a cold cache, each time apart"

    block: int = 1 << 20

    def measure(self, layer: Layer) -> list[Timing]:
        job = plain.Job("read", self.block, self.size, self.seed)
        return [plain.run(step, self.files(layer), job) for step in ("first read", "second read")]
