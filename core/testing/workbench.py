"""One driver on one backing, with the few steps that every check is made of."""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from layerfs import mounts
from layerfs.apply import NeedsParents, apply
from layerfs.diff import write_diff
from layerfs.driver import Change, ChangeKind, Driver
from layerfs.testing.trees import Tree, read_tree


@dataclass
class Workbench:
    """Makes volumes under fresh names and remembers their ancestry, as the store does."""

    driver: Driver
    ancestry: dict[str, tuple[str, ...]] = field(default_factory=dict)
    depth: int = 128
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def prepare(self, parent: str | None = None, *, size: int | None = None) -> str:
        """Make a writable volume on ``parent`` and return its name."""
        volume = self.reserve(parent)
        self.driver.create(volume, self.ancestry[volume], size=size)
        return volume

    def reserve(self, parent: str | None = None) -> str:
        """A fresh name with an ancestry, without a volume behind it."""
        volume = f"v{next(self._numbers)}"
        self.ancestry[volume] = (parent, *self.ancestry[parent]) if parent else ()
        return volume

    def seal(self, volume: str) -> str:
        self.driver.seal(volume, self.ancestry[volume])
        return volume

    def tick(self) -> None:
        """Wait until what is written from now on has another time than what was written before."""
        grain = self.driver.time_granularity
        if grain > 1:
            time.sleep((grain - time.time_ns() % grain) / 10**9 + 0.02)

    def fork(self, source: str) -> str:
        volume = self.reserve()
        self.ancestry[volume] = self.ancestry[source]
        self.driver.fork(volume, source, self.ancestry[volume])
        return volume

    def remove(self, volume: str) -> None:
        self.driver.remove(volume)
        del self.ancestry[volume]

    @contextmanager
    def opened(self, volume: str, *, read_only: bool = False) -> Iterator[int]:
        """A directory descriptor of the volume's tree."""
        with mounts.opened(self.driver.mounts(volume, self.ancestry[volume], read_only=read_only)) as tree:
            yield tree

    @contextmanager
    def mounted(self, volume: str, *, read_only: bool = False) -> Iterator[Path]:
        """A path at which the volume's tree can be seen by this process and its children."""
        with self.opened(volume, read_only=read_only) as tree:
            yield Path(f"/proc/self/fd/{tree}")

    def tree(self, volume: str, *, times: bool = True) -> Tree:
        with self.opened(volume, read_only=True) as tree:
            return read_tree(tree, times=times)

    def changes(self, volume: str) -> list[Change]:
        with self._compared(volume) as (old, new):
            return list(self.driver.changes(volume, self.ancestry[volume], old, new))

    def diff(self, volume: str) -> bytes:
        out = io.BytesIO()
        with self._compared(volume) as (old, new):
            write_diff(self.driver.changes(volume, self.ancestry[volume], old, new), new, out)
        return out.getvalue()

    def apply(self, diff: bytes, volume: str) -> None:
        """Apply a diff as an import does: into the upper where there is one and that is exact, else onto the tree."""
        if self._applied_to_upper(diff, volume):
            return
        with self.opened(volume) as tree:
            apply(io.BytesIO(diff), tree)

    def _applied_to_upper(self, diff: bytes, volume: str) -> bool:
        upper = self.driver.upper(volume)
        if upper is None:
            return False
        descriptor = os.open(upper.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not apply(io.BytesIO(diff), descriptor, whiteouts=upper.whiteouts).implied:
                return True
        except NeedsParents:
            pass
        finally:
            os.close(descriptor)
        self.driver.remove(volume)
        self.driver.create(volume, self.ancestry[volume])
        return False

    @contextmanager
    def _compared(self, volume: str) -> Iterator[tuple[int | None, int]]:
        parents: Sequence[str] = self.ancestry[volume]
        with self.opened(volume, read_only=True) as new:
            if not parents:
                yield None, new
                return
            with self.opened(parents[0], read_only=True) as old:
                yield old, new


def summary(changes: list[Change]) -> list[tuple[ChangeKind, bytes]]:
    """Changes as plain pairs, which pytest shows well when they differ."""
    return [(change.kind, change.path) for change in changes]
