"""Where throughput falls off when a file outgrows memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench import plain
from layerfs.bench.memory import SMALLEST, capped
from layerfs.bench.on_lower import OnAnyParent
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing
from layerfs.errors import EnvironmentUnfit


@dataclass(frozen=True)
class KneeSweep(OnAnyParent):
    """Sizes (``--size``) times caps on memory: if the knee moves with the cap, it is memory's and not the driver's."""

    name = "knee-sweep"
    summary = "write and read a new file with memory capped below and above its size (root)"
    too_small = "no cap on memory is so small"
    programs = ("fio",)
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"memory": (256 << 20, 512 << 20, 1 << 30)}

    memory: int = 256 << 20
    block: int = 1 << 20

    @classmethod
    def hindrance(cls) -> str:
        try:
            with capped(SMALLEST):
                return ""
        except EnvironmentUnfit as error:
            return str(error)

    def measure(self, layer: Layer) -> list[Timing]:
        file = [layer.path / "knee.dat"]
        jobs = [plain.Job(mode, self.block, self.size, self.seed, new=mode == "write") for mode in ("write", "read")]
        with capped(self.memory):
            return [plain.run(job.mode, file, job) for job in jobs]
