"""Reading a file from beginning to end after it was overwritten in random places."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfs.bench import fio
from layerfs.bench.content import LOWER_FILE
from layerfs.bench.on_lower import LowerReader
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing
from layerfs.kernel.fiemap import extents


@dataclass(frozen=True)
class FragRead(LowerReader):
    """Copy-on-write puts each overwritten block elsewhere; extents say how far it went, also where a seek is cheap."""

    name = "frag-read"
    summary = "read a file cold and in order after a tenth of its 4K blocks was overwritten in the layer; its extents"
    too_small = "a tenth of so few blocks leaves no pieces to speak of"
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {"percent": (0, 1, 10, 50)}

    percent: int = 10
    block: int = 1 << 20

    @property
    def writes(self) -> int:
        return self.size

    def set_up(self, layer: Layer) -> None:
        amount = self.size * self.percent // 100
        if amount:
            options = {"end_fsync": 1, "overwrite": 1, "allow_file_create": 0}
            fio.run(layer.path / LOWER_FILE, "randwrite", 4096, self.size, seed=self.seed, io_size=amount, **options)

    def measure(self, layer: Layer) -> list[Timing]:
        done = fio.run(layer.path / LOWER_FILE, "read", self.block, self.size, seed=self.seed)
        return [Timing("read", done.seconds, bytes=done.bytes, processor=done.processor)]

    def counters(self, layer: Layer) -> dict[str, int]:
        layer.target.write_back(layer.path)
        file = os.open(layer.path / LOWER_FILE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return {"extents": len(list(extents(file)))}
        except OSError:  # a file system that does not tell
            return {}
        finally:
            os.close(file)
