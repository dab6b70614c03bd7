"""The first write to a file of a lower layer, step by step."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

from layerfs.bench.content import LOWER_FILE, Base, deepened, lower_file
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class CopyupFirstWrite(Workload):
    """Unions copy the whole file within open(2), where no I/O tester looks; so each system call has its own clock.

    With a ``change`` of 0 the file is opened for writing and nothing is written.
    """

    name = "copyup-first-write"
    summary = "change 4K of a lower layer's file: making the layer, open, write, fsync and a second write apart"

    change: int = 4096
    depth: int = 1

    @property
    def base(self) -> Base:
        return deepened(lower_file(self.size, self.seed), self.depth)

    def measure(self, layer: Layer) -> list[Timing]:
        clock = Stopwatch()
        file = os.open(layer.path / LOWER_FILE, os.O_RDWR | os.O_CLOEXEC)
        try:
            timings = [clock.lap("open"), *(self._change(file) if self.change else [])]
        finally:
            os.close(file)
        made = [Timing("make the layer", layer.created)] if layer.created is not None else []
        return [*timings, *made]

    def _change(self, file: int) -> list[Timing]:
        data = random.Random(self.seed).randbytes(self.change)  # noqa: S311
        middle = self.size // 2 // self.change * self.change
        timings, clock = [], Stopwatch()
        os.pwrite(file, data, middle)
        timings.append(clock.lap("first write"))
        os.fsync(file)
        timings.append(clock.lap("fsync"))
        os.pwrite(file, data, 0)
        os.fsync(file)
        return [*timings, clock.lap("second write")]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes copied up": layer.grown, "bytes when fresh": layer.fresh_size}
