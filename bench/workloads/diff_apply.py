"""A layer's way in and out: applying a diff, and making one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerfs.bench.caches import write_back
from layerfs.bench.content import small_files, write_tar
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class DiffApply(Workload):
    """A tar is applied to an empty layer; the same files, written by hand into another, are made a diff of."""

    name = "diff-apply"
    summary = "apply a layer tar of a thousand files; make the diff of as many files just written"
    too_small = "its thousand files have this size together"
    mounted = False
    about_layers = True

    files: int = 1000
    most: int = 64 << 20

    @property
    def amount(self) -> int:
        return min(self.size, self.most)

    @property
    def writes(self) -> int:
        return 3 * self.amount

    def prepare(self, shared: Path) -> None:
        write_tar(self._tar(shared), self.files, self.amount, self.seed)

    def measure(self, layer: Layer) -> list[Timing]:
        return [self._apply(layer), self._diff(layer)]

    def _apply(self, layer: Layer) -> Timing:
        with open(self._tar(layer.shared), "rb") as tar:
            clock = Stopwatch()
            size = layer.target.apply(layer.key, tar)
            return clock.lap("apply", bytes=size)

    def _diff(self, layer: Layer) -> Timing:
        with layer.target.fresh(None, layer.shared) as written, open("/dev/null", "wb") as sink:
            small_files(self.files, self.amount, self.seed).fill(written.path)
            write_back(written.path)
            clock = Stopwatch()
            size = written.target.diff(written.key, sink)
            return clock.lap("diff", bytes=size)

    def _tar(self, shared: Path) -> Path:
        return shared / f"diff-apply-{self.files}-{self.amount}-{self.seed}.tar"
