"""What workloads have in common that read one large file of a lower layer."""

from __future__ import annotations

from dataclasses import dataclass

from layerfs.bench.caches import CacheState
from layerfs.bench.content import LOWER_FILE, Base, lower_file
from layerfs.bench.workload import Workload


@dataclass(frozen=True)
class LowerReader(Workload):
    """Reads `LOWER_FILE`, beginning with a cold cache, and writes nothing."""

    programs = ("fio",)

    @property
    def base(self) -> Base:
        return lower_file(self.size, self.seed)

    @property
    def writes(self) -> int:
        return 0

    @property
    def cache(self) -> CacheState:
        return CacheState.COLD

    @property
    def reads(self) -> str:
        return LOWER_FILE
