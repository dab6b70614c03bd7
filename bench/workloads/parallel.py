"""Several layers, or several writers of one layer, at work at the same time."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from layerfs.bench import caches, fio
from layerfs.bench.caches import CacheState
from layerfs.bench.content import LOWER_FILE, Base, lower_file
from layerfs.bench.on_lower import LowerReader, OnAnyParent
from layerfs.bench.target import Layer
from layerfs.bench.workload import Stopwatch, Timing, Workload

_MIB = 1 << 20


@dataclass(frozen=True)
class ParallelLight(Workload):
    """Each task has a layer of its own and uses the same lower file now and then; ideal is operations / rate.

    ``access`` is ``update`` (open for writing, change a block, fsync) or ``read`` (open for reading, read one).
    """

    name = "parallel-light"
    summary = "many layers at a time, each using a lower layer's file a few times a second: seconds until all are done"
    mounted = False
    about_layers = True
    sweep: ClassVar[Mapping[str, Sequence[object]]] = {"access": ("update", "read")}
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"tasks": (8, 64)}

    tasks: int = 8
    operations: int = 20
    rate: int = 10
    most: int = 16 * _MIB
    access: str = "update"

    @property
    def base(self) -> Base:
        return lower_file(min(self.size, self.most), self.seed)

    @property
    def writes(self) -> int:
        return self.tasks * self.base.size

    def measure(self, layer: Layer) -> list[Timing]:
        with ExitStack() as stack:
            made = [stack.enter_context(layer.target.fresh(self.base, layer.shared)) for _ in range(self.tasks)]
            files = [one.path / LOWER_FILE for one in made]
            for file in files:
                caches.establish(CacheState.WARM, file)
            with ThreadPoolExecutor(self.tasks) as pool:
                clock = Stopwatch()
                firsts = list(pool.map(self._use, files, range(self.tasks)))
                whole = clock.lap("all tasks")
        return [whole, Timing(f"first {self.access}", sorted(firsts)[len(firsts) // 2])]

    def _use(self, file: Path, number: int) -> float:
        """Seconds of the first use, in which an update copies up."""
        source = random.Random(self.seed + number)  # noqa: S311
        begin, first = time.perf_counter(), 0.0
        for operation in range(self.operations):
            time.sleep(max(0.0, begin + operation / self.rate - time.perf_counter()))
            self._operate(file, source)
            first = first or time.perf_counter() - begin
        return first

    def _operate(self, file: Path, source: random.Random) -> None:
        offset = source.randrange(self.base.size // 4096) * 4096
        updates = self.access == "update"
        descriptor = os.open(file, (os.O_RDWR if updates else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if updates:
                os.pwrite(descriptor, source.randbytes(4096), offset)
                os.fsync(descriptor)
            else:
                os.pread(descriptor, 4096, offset)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class ParallelHeavy(OnAnyParent):
    """No limit on the rate: locks and journals decide."""

    name = "parallel-heavy"
    summary = "several writers at a time into parts of a file that the layer holds, in random 4K blocks, then fsync"
    too_small = "the writers would be done before the last has begun"
    programs = ("fio",)
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"writers": (1, 4, 16, 64)}

    writers: int = 4
    part: int = 32
    state: CacheState = CacheState.COLD

    @property
    def reads(self) -> list[str]:
        return ["own.dat"]

    @property
    def misfit(self) -> str:
        small = self.size // self.writers < 4096 * self.part
        return super().misfit or (f"a writer's share has less than {self.part} blocks" if small else "")

    def set_up(self, layer: Layer) -> None:
        fio.run(layer.path / "own.dat", "write", _MIB, self.size, seed=self.seed + 1, end_fsync=1)

    def measure(self, layer: Layer) -> list[Timing]:
        share = self.size // self.writers // 4096 * 4096
        options = {"numjobs": self.writers, "offset_increment": share, "io_size": max(share // self.part, 4096)}
        file = layer.path / "own.dat"
        done = fio.run(file, "randwrite", 4096, share, seed=self.seed, end_fsync=1, overwrite=1, **options)
        figures = {"latencies": done.latencies, "processor": done.processor}
        return [Timing("write", done.seconds, operations=done.operations, **figures)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class ParallelRead(LowerReader):
    """All begin at the beginning of the same file, as the processes of one container do that use one data set."""

    name = "parallel-read"
    summary = "several readers at a time of one file of a lower layer, each all of it, beginning with a cold cache"
    too_small = "a reader would be done before the next one has begun"
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"readers": (1, 10, 100)}

    readers: int = 4
    block: int = _MIB

    def measure(self, layer: Layer) -> list[Timing]:
        file = layer.path / LOWER_FILE
        done = fio.run(file, "read", self.block, self.size, seed=self.seed, numjobs=self.readers)
        return [Timing("read", done.seconds, bytes=done.bytes, processor=done.processor)]
