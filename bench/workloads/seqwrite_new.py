"""Writing a new file from its beginning to its end."""

from __future__ import annotations

from dataclasses import dataclass

from layerfs.bench import fio
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing, Workload


@dataclass(frozen=True)
class SeqwriteNew(Workload):
    """Space is allocated as the file grows; the final fsync, where there is one, is part of the time."""

    name = "seqwrite-new"
    summary = "write a new file from beginning to end, then fsync (allocation on demand)"
    programs = ("fio",)

    block: int = 1 << 20
    fsync: bool = True

    def measure(self, layer: Layer) -> list[Timing]:
        done = fio.run(
            layer.path / "new.dat", "write", self.block, self.size, seed=self.seed, end_fsync=int(self.fsync)
        )
        return [Timing("write", done.seconds, bytes=done.bytes, latencies=done.latencies, processor=done.processor)]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes allocated": layer.grown}
