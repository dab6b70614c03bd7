"""Appending a line to each of many files of a lower layer: small ones, and big ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench import tasks
from layerfs.bench.caches import CacheState
from layerfs.bench.content import Base, even_files
from layerfs.bench.on_lower import OnSmallFiles
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing


@dataclass(frozen=True)
class AppendMany(OnSmallFiles):
    """Every append copies a file up: what is seen is the cost of a copy-up as such, with the fsync that it may have.

    Each task is a process of its own and has a share of the files; all are ready when the clock starts.
    """

    name = "append-many"
    summary = "append a line to each of many small files of a lower layer, by one task or several"
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"tasks": (1, 10, 100)}

    files: int = 1000
    file_size: int = 512
    tasks: int = 1
    state: CacheState = CacheState.WARM

    @property
    def writes(self) -> int:
        return self.files * max(4096, self.file_size)

    def measure(self, layer: Layer) -> list[Timing]:
        shares = [self.reads[number :: self.tasks] for number in range(self.tasks)]
        with tasks.ready("append", layer.path, shares) as writers:
            return [writers.do("append")]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes copied up": layer.grown}


@dataclass(frozen=True)
class AppendBig(AppendMany):
    """The same with few files, together as large as the run's large file."""

    name = "append-big"
    summary = "append a line to each of a few big files of a lower layer"
    sized = True
    too_small = "its eight files have this size together; append-many has small ones"
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {}

    files: int = 8

    @property
    def base(self) -> Base:
        return even_files(self.files, self.size // self.files, self.seed)

    @property
    def writes(self) -> int:
        return self.size + self.files * 4096
