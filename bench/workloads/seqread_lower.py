"""Reading a file of a lower layer from its beginning to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench import plain
from layerfs.bench.caches import CacheState
from layerfs.bench.on_lower import LowerReader
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing


@dataclass(frozen=True)
class SeqreadLower(LowerReader):
    """Cold, the driver's way to the disk is measured; warm, its way to the page cache."""

    name = "seqread-lower"
    summary = "read a file of a lower layer from beginning to end, with a cold and with a warm cache"
    sweep: ClassVar[Mapping[str, Sequence[object]]] = {"state": (CacheState.COLD, CacheState.WARM)}

    block: int = 1 << 20
    state: CacheState = CacheState.COLD

    def measure(self, layer: Layer) -> list[Timing]:
        return [plain.run("read", self.files(layer), plain.Job("read", self.block, self.size, self.seed))]
