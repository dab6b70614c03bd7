"""Many layers that read one file of their common base: whether they share its place in the page cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench import caches
from layerfs.bench.caches import CacheState
from layerfs.bench.content import LOWER_FILE, Base, lower_file
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class CacheShare(Workload):
    """Before a layer reads the file, mincore(2) tells how much of it is cached for that layer already.

    What is not counts as cached once more, whatever other programs do with the rest of the page cache meanwhile. Where
    files do not go through the page cache, the growth of the file system's own cache is counted, which others share.
    """

    name = "cache-share"
    summary = "read one file of a lower layer in several layers at a time; the bytes cached for all of them"
    too_small = "a small file's pages are shared as a large one's are"
    mounted = False
    about_layers = True
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"readers": (1, 2, 4, 8, 16)}

    readers: int = 4
    most: int = 256 << 20

    @property
    def base(self) -> Base:
        return lower_file(min(self.size, self.most), self.seed)

    @property
    def writes(self) -> int:
        return self.readers * self.base.size

    def measure(self, layer: Layer) -> list[Timing]:
        with ExitStack() as stack:
            made = [stack.enter_context(layer.target.fresh(self.base, layer.shared)) for _ in range(self.readers)]
            files = [one.path / LOWER_FILE for one in made]
            for file in files:
                caches.establish(CacheState.COLD, file)
            unshared, timings, own = 0.0, [], caches.own_cache()
            for file in files:
                unshared += 1 - caches.resident(file)
                clock = Stopwatch()
                reached = caches.establish(CacheState.WARM, file)
                timings.append(clock.lap("read"))
            if reached.as_asked:
                self._cached[id(layer)] = round(unshared * self.base.size)
            elif own is not None:
                self._cached[id(layer)] = max(0, (caches.own_cache() or 0) - own)
        first, rest = timings[0], timings[1:]
        steps = [Timing("first reader", first.seconds, bytes=self.base.size, processor=first.processor)]
        if rest:
            seconds, processor = (sum(getattr(t, f) for t in rest) / len(rest) for f in ("seconds", "processor"))
            steps.append(Timing("further reader", seconds, bytes=self.base.size, processor=processor))
        return steps

    def counters(self, layer: Layer) -> dict[str, int]:
        cached = self._cached.pop(id(layer), None)
        return {} if cached is None else {"bytes cached": cached}

    _cached: ClassVar[dict[int, int]] = {}
