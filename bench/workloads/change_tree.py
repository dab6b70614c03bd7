"""Changing the tree of a lower layer, as a build or a package manager does, and nothing of what files hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from layerfs.bench.caches import CacheState
from layerfs.bench.on_lower import OnSmallFiles
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing


@dataclass(frozen=True)
class ChangeTree(OnSmallFiles):
    """Nothing but metadata, in directories of the lower layer, which a union copies up in the first step.

    Removing a file of the lower layer leaves a whiteout in a union; making one anew in its place takes that away.
    """

    name = "change-tree"
    summary = "make, rename and remove small files of the layer's own, then remove and replace a lower layer's"

    files: int = 500
    state: CacheState = CacheState.WARM

    @property
    def writes(self) -> int:
        return 2 * self.files * 4096

    def measure(self, layer: Layer) -> list[Timing]:
        lower = [layer.path / name for name in self.reads]
        own = [path.with_suffix(".new") for path in lower]
        renamed = [path.with_suffix(".renamed") for path in lower]
        directories = [path.with_suffix(".d") for path in lower]
        steps: dict[str, tuple[Callable[..., object], list[list[Path]]]] = {
            "create": (_create, [own]),
            "rename": (os.rename, [own, renamed]),
            "unlink": (os.unlink, [renamed]),
            "mkdir": (os.mkdir, [directories]),
            "rmdir": (os.rmdir, [directories]),
            "unlink lower": (os.unlink, [lower]),
            "replace lower": (_create, [lower]),
        }
        timings, clock = [], Stopwatch()
        for step, (operation, paths) in steps.items():
            for given in zip(*paths, strict=True):
                operation(*given)
            timings.append(clock.lap(step, operations=self.files))
        return timings


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
