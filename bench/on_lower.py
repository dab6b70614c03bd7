"""What workloads have in common that use one large file of a lower layer, or many small ones, or none of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerfs.bench.caches import CacheState
from layerfs.bench.content import Base, even_files, even_names, lower_files, lower_names
from layerfs.bench.target import Layer
from layerfs.bench.workload import Workload


@dataclass(frozen=True)
class OnAnyParent(Workload):
    """Works on files of its own, in a layer over ``parent_files`` small files that it does not touch."""

    parent_files: int = 100

    @property
    def base(self) -> Base:
        return even_files(self.parent_files, 512, self.seed)


@dataclass(frozen=True)
class OnLower(Workload):
    """Uses `lower_names`."""

    @property
    def base(self) -> Base:
        return lower_files(self.size, self.seed)

    @property
    def reads(self) -> list[str]:
        return lower_names(self.size)

    def files(self, layer: Layer) -> list[Path]:
        """What is to be used."""
        return [layer.path / name for name in self.reads]


@dataclass(frozen=True)
class LowerReader(OnLower):
    """Reads them, beginning with a cold cache, and writes nothing."""

    programs = ("fio",)

    @property
    def writes(self) -> int:
        return 0

    @property
    def state(self) -> CacheState:
        return CacheState.COLD


@dataclass(frozen=True)
class OnSmallFiles(Workload):
    """Uses ``files`` files of ``file_size`` bytes each, which `even_names` names."""

    sized = False
    file_size = 512

    files: int = 1000

    @property
    def base(self) -> Base:
        return even_files(self.files, self.file_size, self.seed)

    @property
    def reads(self) -> list[str]:
        return even_names(self.files)
