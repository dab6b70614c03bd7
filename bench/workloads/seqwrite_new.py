"""Writing a new file from its beginning to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench import plain
from layerfs.bench.on_lower import OnAnyParent
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing


@dataclass(frozen=True)
class SeqwriteNew(OnAnyParent):
    """Space is allocated as the file grows; the final fsync, where there is one, is part of the time."""

    name = "seqwrite-new"
    summary = "write a new file from beginning to end, then fsync (allocation on demand)"
    programs = ("fio",)
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"fsync": (True, False)}

    block: int = 1 << 20
    fsync: bool = True

    def measure(self, layer: Layer) -> list[Timing]:
        files = [layer.path / f"new-{number}.dat" for number in range(self.alike)]
        job = plain.Job("write", self.block, self.size, self.seed, new=True, fsync=self.fsync)
        return [plain.run("write", files, job)]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes allocated": layer.grown // self.alike}
