"""Writing into a file of a lower layer in random order."""

from __future__ import annotations

import os
from dataclasses import dataclass

from layerfs.bench import fio
from layerfs.bench.content import LOWER_FILE, Base, lower_file
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
    def base(self) -> Base:
        return lower_file(self.size, self.seed)

    def set_up(self, layer: Layer) -> None:
        os.close(os.open(layer.path / LOWER_FILE, os.O_RDWR | os.O_CLOEXEC))

    def measure(self, layer: Layer) -> list[Timing]:
        amount = max(self.size // self.part, self.block)
        done = fio.run(
            layer.path / LOWER_FILE,
            "randwrite",
            self.block,
            self.size,
            seed=self.seed,
            io_size=amount,
            end_fsync=int(self.fsync),
            overwrite=1,
            allow_file_create=0,
        )
        return [
            Timing(
                "write", done.seconds, operations=done.operations, latencies=done.latencies, processor=done.processor
            )
        ]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes allocated": layer.grown}
