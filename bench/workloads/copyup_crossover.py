"""How much of a lower layer's file has to change before copying all of it is cheaper than copying blocks."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from layerfs.bench.caches import CacheState
from layerfs.bench.content import Supply
from layerfs.bench.on_lower import OnLower
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, repeated


@dataclass(frozen=True)
class CopyupCrossover(OnLower):
    """From open(2) to fsync(2), so that a driver which copies the file pays for that, too."""

    name = "copyup-crossover"
    summary = "change a part of a lower layer's file in random blocks, with the copy-up: where block copies stop to win"
    sweep: ClassVar[Mapping[str, Sequence[object]]] = {"percent": (1, 50)}
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"percent": (0.1, 1, 5, 10, 25, 50, 100)}

    percent: float = 1
    block: int = 4096
    state: CacheState = CacheState.WARM

    @property
    def misfit(self) -> str:
        return "" if self._blocks * self.percent >= 100 else f"{self.percent:g} % of the file is less than a block"

    def measure(self, layer: Layer) -> list[Timing]:
        source = random.Random(self.seed)  # noqa: S311
        changed = source.sample(range(self._blocks), round(self._blocks * self.percent / 100))
        return [repeated([self._change(file, changed) for file in self.files(layer)])]

    def _change(self, path: Path, changed: Sequence[int]) -> Timing:
        data = Supply(self.size, self.block, self.seed, path.name)
        clock = Stopwatch()
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            for number in changed:
                os.pwrite(file, data.at(number * self.block), number * self.block)
            os.fsync(file)
        finally:
            os.close(file)
        return clock.lap("change", operations=len(changed))

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes copied up": layer.grown // self.alike}

    @property
    def _blocks(self) -> int:
        return self.size // self.block
