"""Making, mounting, unmounting and removing layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from layerfs import mount_table
from layerfs.bench.content import Base, small_files, write_random
from layerfs.bench.target import Layer, Target
from layerfs.bench.workload import Stopwatch, Timing, Workload, repeated


@dataclass(frozen=True)
class LayerLifecycle(Workload):
    """What a container's start and stop cost the storage, over a parent of 500 small files.

    Counted are the mounts that a layer takes, and what is there in the end and was not at the beginning, which removing
    has left: open files for each layer, space in use and inodes where the backing counts them at once, and with
    ``written`` bytes written into each layer what the disk holds, which the backing has not given back.
    """

    name = "layer-lifecycle"
    summary = "make, mount, unmount and remove a layer over a small parent, many times, each step apart"
    sized = False
    mounted = False
    about_layers = True

    repetitions: int = 20
    files: int = 500
    parent_size: int = 8 << 20
    written: int = 0

    @property
    def base(self) -> Base:
        return small_files(self.files, self.parent_size, self.seed)

    @property
    def writes(self) -> int:
        return self.parent_size + self.repetitions * self.written

    def measure(self, layer: Layer) -> list[Timing]:
        target, key = layer.target, self._key(layer)
        before, opened = self._space(target), _open_files()
        trees: list[Path] = []
        write: dict[str, Callable[[], object]] = {"write": lambda: self._write(trees[-1])}
        steps: dict[str, Callable[[], object]] = {
            "create": lambda: target.create(key, self.base),
            "mount": lambda: trees.append(target.mount(key)),
            **(write if self.written else {}),
            "unmount": lambda: target.unmount(key),
            "remove": lambda: target.remove(key),
        }
        mounts = 0
        taken: dict[str, list[Timing]] = {step: [] for step in steps}
        for _ in range(self.repetitions):
            for step, action in steps.items():
                clock = Stopwatch()
                action()
                taken[step].append(clock.lap(step))
                if step == "mount":
                    mounts = _mounts(trees[-1])
        left = {name: max(0, now - before[name]) for name, now in self._space(target).items() if now >= 0}
        files = max(0, _open_files() - opened) // self.repetitions  # what stays open once for all is no layer's
        self._counted[layer.key] = {"mounts of a layer": mounts, "open files left by a layer": files, **left}
        return [repeated(timings) for timings in taken.values()]

    def counters(self, layer: Layer) -> dict[str, int]:
        return self._counted.pop(layer.key)

    def tear_down(self, layer: Layer) -> None:
        layer.target.discard(self._key(layer))

    def _write(self, root: Path) -> None:
        write_random(root / "written.dat", self.written, self.seed)

    def _space(self, target: Target) -> dict[str, int]:
        """What is in use; -1 where that is not told."""
        used = target.used()
        return {
            "bytes left in use": used.size,
            "inodes left in use": used.inodes,
            "bytes left on disk": target.held() if self.written else -1,
        }

    _counted: ClassVar[dict[str, dict[str, int]]] = {}

    @staticmethod
    def _key(layer: Layer) -> str:
        return f"{layer.key} repeated"


def _mounts(tree: Path) -> int:
    """Those at ``tree``, and the ones below it."""
    return len(mount_table.at(tree)) + len(mount_table.below(tree))


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
