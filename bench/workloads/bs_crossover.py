"""Block sizes with the file's size held: what iozone changes unasked at 16 MiB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench import plain
from layerfs.bench.on_lower import OnAnyParent
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing


@dataclass(frozen=True)
class BsCrossover(OnAnyParent):
    """No fsync, as iozone has none by default: throughput is that of the page cache and its bookkeeping."""

    name = "bs-crossover"
    summary = "write and read a new file of at most 64M, buffered, in small and in large blocks"
    programs = ("fio",)
    sweep: ClassVar[Mapping[str, Sequence[object]]] = {"block": (4096, 65536)}
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"block": (4096, 16384, 65536, 262144, 1 << 20)}

    block: int = 4096
    most: int = 64 << 20

    @property
    def amount(self) -> int:
        return min(self.size, self.most)

    @property
    def misfit(self) -> str:
        return "" if self.block <= self.amount else "the block is larger than the file"

    @property
    def writes(self) -> int:
        return self.amount * self.alike

    def measure(self, layer: Layer) -> list[Timing]:
        files = [layer.path / f"blocks-{number}.dat" for number in range(self.alike)]
        jobs = [plain.Job(mode, self.block, self.amount, self.seed, new=True) for mode in ("write", "read")]
        return [plain.run(job.mode, files, job) for job in jobs]
