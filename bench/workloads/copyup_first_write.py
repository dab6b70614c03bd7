"""The first write to a file of a lower layer, step by step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from layerfs.bench.caches import CacheState
from layerfs.bench.content import Base, Supply, deepened
from layerfs.bench.on_lower import OnLower
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, repeated


@dataclass(frozen=True)
class CopyupFirstWrite(OnLower):
    """Unions copy the whole file within open(2), where no I/O tester looks; so each system call has its own clock.

    With a ``change`` of 0 the file is opened for writing and nothing is written. Of many small files, making the layer
    and its space are left out, for they are not those of one file.
    """

    name = "copyup-first-write"
    summary = "change 4K of a lower layer's file: making the layer, open, write, fsync and a second write apart"

    change: int = 4096
    depth: int = 1
    state: CacheState = CacheState.WARM

    @property
    def base(self) -> Base:
        return deepened(super().base, self.depth)

    def measure(self, layer: Layer) -> list[Timing]:
        every = [self._open(file) for file in self.files(layer)]
        timings = [repeated(steps) for steps in zip(*every, strict=True)]
        if layer.created is None or self.alike > 1:
            return timings
        return [*timings, Timing("make the layer", layer.created)]

    def _open(self, path: Path) -> list[Timing]:
        clock = Stopwatch()
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return [clock.lap("open"), *(self._change(file, path) if self.change else [])]
        finally:
            os.close(file)

    def _change(self, file: int, path: Path) -> list[Timing]:
        data = Supply(self.size, self.change, self.seed, path.name)
        middle = self.size // 2 // self.change * self.change
        first, second = data.at(middle), data.at(0)
        timings, clock = [], Stopwatch()
        os.pwrite(file, first, middle)
        timings.append(clock.lap("first write"))
        os.fsync(file)
        timings.append(clock.lap("fsync"))
        os.pwrite(file, second, 0)
        os.fsync(file)
        return [*timings, clock.lap("second write")]

    def counters(self, layer: Layer) -> dict[str, int]:
        copied = {"bytes copied up": layer.grown // self.alike}
        return copied if self.alike > 1 else {**copied, "bytes when fresh": layer.fresh_size}
