"""Where samples are taken: something that makes fresh layers.

`Target` is what a workload and the runner see; `layerfs.bench.scratch.StoreTarget` is a driver below a store of its
own, `layerfs.bench.native.NativeTarget` no driver at all.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO, ClassVar

from layerfs.bench.content import Base
from layerfs.driver import Usage


@dataclass(frozen=True)
class Layer:
    """One sample's layer.

    Attributes:
        target: what it was made on; workloads about layers themselves make more of them there.
        key: its name there.
        shared: the directory where `Workload.prepare` put what all samples share.
        created: seconds that making and mounting it took; None where there is nothing to make (the native control).
        fresh_size: bytes that it had on the backing then (a full copy has many).
        tree: where it is mounted, or None.
    """

    target: Target
    key: str
    shared: Path
    created: float | None
    fresh_size: int
    tree: Path | None

    @property
    def path(self) -> Path:
        """Where it is mounted."""
        if self.tree is None:
            raise ValueError(f"the layer {self.key!r} is not mounted")
        return self.tree

    @property
    def grown(self) -> int:
        """Bytes that it has on the backing beyond what it had when it was fresh."""
        return self.target.occupied(self.key) - self.fresh_size


class Target(ABC):
    """One thing that is measured: a driver on a backing."""

    name: str
    has_layers: ClassVar[bool] = True
    """False for a control that knows no layers: work on layers as such is not measured there."""

    @abstractmethod
    def create(self, key: str, base: Base | None) -> None:
        """Make a writable layer on ``base``, or an empty one."""

    @abstractmethod
    def mount(self, key: str) -> Path:
        """Mount a layer and say where."""

    @abstractmethod
    def unmount(self, key: str) -> None:
        """Take a layer's mount down."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Take a layer away."""

    @abstractmethod
    def occupied(self, key: str) -> int:
        """Bytes that a layer alone has on the backing, once all is written back."""

    @abstractmethod
    def write_back(self, *trees: Path) -> None:
        """Have on the disk what was written to ``trees`` (mounted layers, or other places) and to the backing.

        Of a layer both are needed: where a daemon serves it, syncfs(2) on its tree reaches the daemon alone.
        """

    @abstractmethod
    def commit(self, key: str, name: str) -> None:
        """Finish a layer, which may be mounted, as the parent ``name`` of others."""

    @abstractmethod
    def held(self) -> int:
        """Bytes of the disk that everything on this target holds, with what its backing has not given back.

        -1 on a device, which does not say.
        """

    @abstractmethod
    def used(self) -> Usage:
        """What everything on this target has in use on the backing; inodes only where that counts them at once."""

    @abstractmethod
    def apply(self, key: str, diff: BinaryIO) -> int:
        """Apply a layer tar to an unmounted layer; its size in bytes."""

    @abstractmethod
    def diff(self, key: str, out: BinaryIO) -> int:
        """Write a layer's changes as a layer tar; its size in bytes."""

    @abstractmethod
    def build(self, base: Base) -> None:
        """Make the committed layer that ``base`` describes."""

    @property
    def most_mounted(self) -> int | None:
        """See `layerfs.driver.Driver.most_mounted`."""
        return None

    @abstractmethod
    def facts(self) -> dict[str, object]:
        """What it stands on, for the run file."""

    @abstractmethod
    def discard(self, key: str) -> None:
        """Unmount and remove a layer that may be mounted, or not be there at all."""

    @contextmanager
    def fresh(self, base: Base | None, shared: Path, *, mounted: bool = True) -> Iterator[Layer]:
        """A new layer that is gone afterwards."""
        key = f"sample {next(_numbers)}"
        begin = time.perf_counter()
        try:
            self.create(key, base)
            tree = self.mount(key) if mounted else None
            created = time.perf_counter() - begin if self.has_layers else None
            yield Layer(self, key, shared, created, self.occupied(key), tree)
        finally:
            self.discard(key)


_numbers = count(1)
