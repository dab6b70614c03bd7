"""Looking names up through many layers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench.content import Base, deepened, even_file, even_files
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class DeepLayers(Workload):
    """The files lie in the lowest layer. Each is looked up once, so that no name is in the kernel's cache."""

    name = "deep-layers"
    summary = "open, stat and miss files of the lowest of many layers, each name for the first time"
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

    def measure(self, layer: Layer) -> list[Timing]:
        paths = [layer.path / even_file(number) for number in range(self.files)]
        half = self.files // 2
        clock = Stopwatch()
        for path in paths[:half]:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        opened = clock.lap("open", operations=half)
        for path in paths[half:]:
            path.stat()
        looked = clock.lap("stat", operations=self.files - half)
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                path.with_suffix(".missing").stat()
        return [opened, looked, clock.lap("miss", operations=self.files)]
