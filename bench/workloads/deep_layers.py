"""Looking names up through many layers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from layerfs.bench.caches import CacheState
from layerfs.bench.content import Base, deepened, even_files, even_names
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class DeepLayers(Workload):
    """The files lie in the lowest layer, in directories that every layer has something in.

    Each name is looked up once, with none of it in the kernel's cache: a driver that has just copied the files would
    find their names there, and one that has only mounted them would not.
    """

    name = "deep-layers"
    summary = "make a layer on many others; open, stat and miss files of the lowest, each name cold"
    sized = False
    sweep: ClassVar[Mapping[str, Sequence[object]]] = {"depth": (1, 16)}
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"depth": (1, 2, 4, 8, 16, 32, 64, 100)}

    depth: int = 1
    files: int = 300

    @property
    def base(self) -> Base:
        return deepened(even_files(self.files, 512, self.seed), self.depth)

    @property
    def writes(self) -> int:
        return 0

    @property
    def state(self) -> CacheState:
        return CacheState.COLD

    @property
    def reads(self) -> list[str]:
        return even_names(self.files)

    def measure(self, layer: Layer) -> list[Timing]:
        paths = [layer.path / name for name in self.reads]
        half = self.files // 2
        clock = Stopwatch()
        for path in paths[:half]:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        opened = clock.lap("open", operations=half)
        for path in paths[half:]:
            path.stat()
        looked = clock.lap("stat", operations=self.files - half)
        for path in paths:
            _miss(path)
        missed = clock.lap("miss", operations=self.files)
        made = [] if layer.created is None else [Timing("make the layer", layer.created)]
        return [opened, looked, missed, *made]


def _miss(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.with_suffix(".missing").stat()
