"""Writing once more over a file that the layer itself holds."""

from __future__ import annotations

from dataclasses import dataclass

from layerfs.bench import fio
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing, Workload


@dataclass(frozen=True)
class RewriteUpper(Workload):
    """The file was written through the same layer before, so nothing is copied up."""

    name = "rewrite-upper"
    summary = "overwrite a file that this layer holds, from beginning to end, then fsync"
    programs = ("fio",)

    block: int = 1 << 20
    fsync: bool = True

    def set_up(self, layer: Layer) -> None:
        fio.run(layer.path / "own.dat", "write", 1 << 20, self.size, seed=self.seed + 1, end_fsync=1)

    def measure(self, layer: Layer) -> list[Timing]:
        file = layer.path / "own.dat"
        done = fio.run(file, "write", self.block, self.size, seed=self.seed, end_fsync=int(self.fsync), overwrite=1)
        return [Timing("rewrite", done.seconds, bytes=done.bytes, latencies=done.latencies, processor=done.processor)]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes allocated": layer.grown}
