"""Writing into a file of a lower layer in random order."""

from __future__ import annotations

import os
from dataclasses import dataclass

from layerfs.bench import plain
from layerfs.bench.content import Base, lower_files, lower_names
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing, Workload


@dataclass(frozen=True)
class Randwrite(Workload):
    """Buffered writes and a final fsync.

    A driver that copies whole files up has done so before the clock starts (copyup-first-write clocks that); one that
    copies blocks pays here, for each block.
    """

    name = "randwrite"
    summary = "write a thirty-second of a lower layer's file in random 4K blocks, then fsync (after any copy-up)"
    programs = ("fio",)

    block: int = 4096
    part: int = 32
    fsync: bool = True

    @property
    def misfit(self) -> str:
        return "" if self.block < self.size else "the file is one block, which has no random order"

    @property
    def base(self) -> Base:
        return lower_files(self.size, self.seed)

    def set_up(self, layer: Layer) -> None:
        for name in lower_names(self.size):
            os.close(os.open(layer.path / name, os.O_RDWR | os.O_CLOEXEC))

    def measure(self, layer: Layer) -> list[Timing]:
        job = plain.Job("randwrite", self.block, self.size, self.seed, part=self.size // self.part, fsync=self.fsync)
        return [plain.run("write", [layer.path / name for name in lower_names(self.size)], job)]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes allocated": layer.grown // self.alike}
