"""Thin pools for tests: one for each, with a driver on it, of which nothing stays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from layerfs import mounts
from layerfs.backing import Backing, BackingSpec
from layerfs.driver import Driver
from layerfs.kernel import dm
from layerfs.testing.trees import Tree, read_tree
from layerfs.thinpool import Pool

MIB = 1 << 20

D = TypeVar("D", bound=Driver)


@dataclass(frozen=True, slots=True)
class MadePool(Generic[D]):
    """A pool, and a driver that keeps its volumes on it."""

    backing: Backing
    driver: D

    @property
    def pool(self) -> Pool:
        return Pool(self.backing.facts["pool"])

    @property
    def devices(self) -> list[str]:
        """The active thin devices."""
        return [name for name in dm.devices() if name.startswith(f"{self.pool.name}-")]

    @property
    def used(self) -> int:
        return self.pool.status(flush=True).used

    def reopened(self) -> D:
        return type(self.driver)(self.driver.root, self.driver.options)

    def check_all(self) -> list[str]:
        """What `check` says of all volumes, those without a parent in the database's eyes included."""
        driver = self.reopened()
        return [problem.what for volume in driver.volumes() for problem in driver.check(volume, ())]


@contextmanager
def temporary(
    kind: type[D], place: Path, *, options: Mapping[str, str] | None = None, **spec: int | str | None
) -> Iterator[MadePool[D]]:
    """A pool of 256 MiB that does not grow by itself, but for what ``spec`` says, with a driver of this ``kind``.

    It goes with the context, and nothing may stay.
    """
    before = leftovers()
    wanted: dict[str, Any] = {"size": 256 * MIB, "largest": 256 * MIB} | spec
    backing = Backing.create(place, BackingSpec("thinpool", **wanted))
    with ExitStack() as stack:
        stack.callback(backing.destroy)
        backing.up()
        root = backing.path / "driver"
        root.mkdir(mode=0o700)
        driver = kind(root, options or {})
        stack.callback(driver.close)
        yield MadePool(backing, driver)
    assert leftovers() == before


def leftovers() -> tuple[list[str], list[str], list[str]]:
    """Devices of the device-mapper, names below /dev/mapper, and loop devices of backings."""
    files = [path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    return dm.devices(), sorted(os.listdir("/dev/mapper")), sorted(f for f in files if f.endswith(".img"))


def tree(driver: Driver, volume: str) -> Tree:
    """What a volume shows."""
    with mounts.opened(driver.mounts(volume, (), read_only=True)) as fd:
        return read_tree(fd)


def write(driver: Driver, volume: str, name: str, data: bytes) -> None:
    """Write a file of a volume."""
    with mounts.opened(driver.mounts(volume, ())) as fd:
        Path(f"/proc/self/fd/{fd}", name).write_bytes(data)


def sealed_base(driver: Driver, size: int = 5 * MIB) -> Tree:
    """Make the volume "base", and say what it shows."""
    driver.create("base", ())
    write(driver, "base", "data", os.urandom(size))
    write(driver, "base", "small", b"small")
    driver.seal("base", ())
    return tree(driver, "base")


def fill(driver: Driver, volume: str, name: str, size: int, *, sync: bool, watched: bool = True) -> None:
    """Write to a volume; unless it is ``watched``, while no process has the store open."""
    found = driver.mounts(volume, ())
    if not watched:
        driver.close()
    with mounts.opened(found) as fd:
        block = os.urandom(MIB)
        with open(f"/proc/self/fd/{fd}/{name}", "wb", buffering=0) as file:
            file.writelines(block for _ in range(size // MIB))
            if sync:
                os.fsync(file.fileno())
