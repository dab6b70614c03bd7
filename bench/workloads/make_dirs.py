"""Making many directories."""

from __future__ import annotations

import os
from dataclasses import dataclass

from layerfs.bench.on_lower import OnAnyParent
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing


@dataclass(frozen=True)
class MakeDirs(OnAnyParent):
    """Nothing but metadata: what one request costs that a program in user space may have to answer."""

    name = "make-dirs"
    summary = "make many directories in a fresh layer, a hundred in each"
    sized = False

    directories: int = 2000

    @property
    def writes(self) -> int:
        return self.directories * 4096

    def measure(self, layer: Layer) -> list[Timing]:
        root = str(layer.path)
        clock = Stopwatch()
        for number in range(self.directories):
            place = f"{root}/{number // 100}"
            os.mkdir(place if number % 100 == 0 else f"{place}/{number}")
        return [clock.lap("make", operations=self.directories)]
