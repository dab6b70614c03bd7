"""Writing into a file of a lower layer in random order."""

from __future__ import annotations

import os
from dataclasses import dataclass

from layerfs.bench import plain
from layerfs.bench.caches import CacheState
from layerfs.bench.on_lower import OnLower
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing


@dataclass(frozen=True)
class Randwrite(OnLower):
    """Buffered writes and a final fsync.

    A driver that copies whole files up has done so before the clock starts (copyup-first-write clocks that); one that
    copies blocks pays here, for each block. Nothing of the file is cached then: in what pieces a copy left it in the
    cache, which is no driver's doing, changes the time by half and more.
    """

    name = "randwrite"
    summary = "write a thirty-second of a lower layer's file in random 4K blocks, then fsync (after any copy-up), cold"
    programs = ("fio",)

    block: int = 4096
    part: int = 32
    fsync: bool = True
    state: CacheState = CacheState.COLD

    @property
    def misfit(self) -> str:
        return "" if self.block < self.size else "the file is one block, which has no random order"

    def set_up(self, layer: Layer) -> None:
        for file in self.files(layer):
            os.close(os.open(file, os.O_RDWR | os.O_CLOEXEC))

    def measure(self, layer: Layer) -> list[Timing]:
        job = plain.Job("randwrite", self.block, self.size, self.seed, part=self.size // self.part, fsync=self.fsync)
        return [plain.run("write", self.files(layer), job)]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes allocated": layer.grown // self.alike}
