"""Writing once more over a file that the layer itself holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerfs.bench import plain
from layerfs.bench.caches import CacheState
from layerfs.bench.on_lower import OnAnyParent
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing


@dataclass(frozen=True)
class RewriteUpper(OnAnyParent):
    """The file was written through the same layer before, so nothing is copied up."""

    name = "rewrite-upper"
    summary = "overwrite a file that this layer holds, from beginning to end, then fsync"
    programs = ("fio",)

    block: int = 1 << 20
    fsync: bool = True
    state: CacheState = CacheState.WARM

    @property
    def reads(self) -> list[str]:
        return [f"own-{number}.dat" for number in range(self.alike)]

    def set_up(self, layer: Layer) -> None:
        job = plain.Job("write", 1 << 20, self.size, self.seed + 1, new=True, fsync=True)
        plain.run("make", self._files(layer), job)

    def measure(self, layer: Layer) -> list[Timing]:
        job = plain.Job("write", self.block, self.size, self.seed, fsync=self.fsync)
        return [plain.run("rewrite", self._files(layer), job)]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes allocated": layer.grown // self.alike}

    def _files(self, layer: Layer) -> list[Path]:
        return [layer.path / name for name in self.reads]
