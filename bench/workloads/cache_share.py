"""Many layers that read one file of their common base: whether they share its place in the page cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench import caches
from layerfs.bench.caches import CacheState, Reached
from layerfs.bench.content import LOWER_FILE, Base, lower_file
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload


@dataclass(frozen=True)
class CacheShare(Workload):
    """``access`` is ``read``, or ``mmap`` as for the code of programs.

    Before a layer reads the file, mincore(2) tells how much of it is cached for that layer already.

    What is not counts as cached once more, whatever other programs do with the rest of the page cache meanwhile. Where
    files do not go through the page cache, the growth of the file system's own cache is counted, which others share.

    Where nothing can be counted, the steps have names that say why: "not cold" where some of the file was cached before
    the first reader came, "cache unseen" where what was read is afterwards in no cache that can be looked into.
    """

    name = "cache-share"
    summary = "read one file of a lower layer in several layers at a time; the bytes cached for all of them"
    too_small = "a small file's pages are shared as a large one's are"
    mounted = False
    about_layers = True
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"readers": (1, 2, 4, 8, 16), "access": ("read", "mmap")}

    readers: int = 4
    access: str = "read"
    most: int = 256 << 20

    @property
    def base(self) -> Base:
        return lower_file(min(self.size, self.most), self.seed)

    @property
    def writes(self) -> int:
        return self.readers * self.base.size

    def measure(self, layer: Layer) -> list[Timing]:
        unshared, timings, held = 0.0, [], []
        with ExitStack() as stack:
            made = [stack.enter_context(layer.target.fresh(self.base, layer.shared)) for _ in range(self.readers)]
            files = [one.path / LOWER_FILE for one in made]
            caches.write_back(*files)
            begun, own = caches.establish(CacheState.COLD, *files), caches.own_cache()
            for file in files:
                unshared += 1 - caches.resident(file)
                clock = Stopwatch()
                if self.access == "mmap":
                    caches.read_mapped(file)
                else:
                    caches.read([file])
                timings.append(clock.lap("read", bytes=self.base.size))
                held.append(caches.resident(file))
            grown = 0 if own is None else (caches.own_cache() or 0) - own
        why, cached = "", None
        if not begun.as_asked:
            why = ", not cold"
        elif Reached(CacheState.WARM, "read", min(held)).as_asked:
            cached = round(unshared * self.base.size)
        elif not any(held) and grown > self.base.size // 2:  # the first reader alone makes it grow by all of it
            cached = grown
        elif not any(held):
            why = ", cache unseen"
        if cached is not None:
            self._cached[layer.key] = cached
        steps = [dataclasses.replace(timings[0], step=f"first reader{why}")]
        if rest := timings[1:]:
            seconds, processor = (sum(getattr(t, f) for t in rest) / len(rest) for f in ("seconds", "processor"))
            steps.append(Timing(f"further reader{why}", seconds, bytes=self.base.size, processor=processor))
        return steps

    def counters(self, layer: Layer) -> dict[str, int]:
        cached = self._cached.pop(layer.key, None)
        return {} if cached is None else {"bytes cached": cached}

    _cached: ClassVar[dict[str, int]] = {}
