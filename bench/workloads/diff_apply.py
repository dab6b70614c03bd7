"""A layer's way in and out: applying a diff, and making one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from layerfs.bench.caches import CacheState, establish
from layerfs.bench.content import Base, small_files, tree, write_tar
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class DiffApply(Workload):
    """A tar is applied to an empty layer; the same files, written by hand into another, are diffed, and counted.

    And a diff is made of a layer that changes a few of its parent's files: what it costs to find them, and whether it
    holds no others. All that is read is cached, the parent by making that diff once before.
    """

    name = "diff-apply"
    summary = "apply a layer tar of a thousand files; diff and count as many just written; diff a few changed ones"
    too_small = "its files have this size together"
    mounted = False
    about_layers = True
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"files": (10, 1000, 10_000)}

    files: int = 1000
    most: int = 64 << 20
    parent_files: int = 500
    parent_size: int = 8 << 20
    changed: int = 10

    @property
    def base(self) -> Base:
        return small_files(self.parent_files, self.parent_size, self.seed)

    @property
    def amount(self) -> int:
        return min(self.size, self.most)

    @property
    def writes(self) -> int:
        return 3 * self.amount + 2 * self.parent_size

    def prepare(self, shared: Path) -> None:
        write_tar(self._tar(shared), self.files, self.amount, self.seed)

    def measure(self, layer: Layer) -> list[Timing]:
        # The small diff first: file systems are busy for a while with what was removed after the others.
        small = self._small_diff(layer)
        return [self._apply(layer), *self._diff(layer), small]

    def counters(self, layer: Layer) -> dict[str, int]:
        return self._counted.pop(layer.key)

    def _apply(self, layer: Layer) -> Timing:
        establish(CacheState.WARM, self._tar(layer.shared))
        with layer.target.fresh(None, layer.shared, mounted=False) as empty, open(self._tar(layer.shared), "rb") as tar:
            clock = Stopwatch()
            size = empty.target.apply(empty.key, tar)
            timing = clock.lap("apply", bytes=size)
            self._counted[layer.key]["bytes applied"] = empty.grown
            return timing

    def _diff(self, layer: Layer) -> list[Timing]:
        with layer.target.fresh(None, layer.shared) as written:
            small_files(self.files, self.amount, self.seed).fill(written.path)
            written.target.write_back(written.path)
            made, clock = _diff_of(written, "diff"), Stopwatch()
            written.target.occupied(written.key)
            return [made, clock.lap("usage")]

    def _small_diff(self, layer: Layer) -> Timing:
        root = layer.target.mount(layer.key)
        names = [name for name, _ in tree(self.parent_files, self.parent_size, self.seed)]
        for name in names[:: len(names) // self.changed]:
            with open(root / name, "ab") as file:
                file.write(b"changed")
        layer.target.write_back(root)
        layer.target.unmount(layer.key)
        _diff_of(layer, "before")
        timing = _diff_of(layer, "small diff")
        self._counted[layer.key] = {"bytes of the small diff": timing.bytes}
        return timing

    def _tar(self, shared: Path) -> Path:
        return shared / f"diff-apply-{self.files}-{self.amount}-{self.seed}.tar"

    _counted: ClassVar[dict[str, dict[str, int]]] = {}


def _diff_of(layer: Layer, step: str) -> Timing:
    with open("/dev/null", "wb") as sink:
        clock = Stopwatch()
        size = layer.target.diff(layer.key, sink)
        return clock.lap(step, bytes=size)
