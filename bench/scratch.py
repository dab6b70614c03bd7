"""A run's scratch directory with a store for each driver, of which nothing stays."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Self

from layerfs import mount_table, mounts, registry
from layerfs.backing import DIRECTORY, Backing, BackingSpec
from layerfs.bench import target_name
from layerfs.bench.caches import write_back
from layerfs.bench.content import Base, stack_up
from layerfs.bench.fingerprint import storage
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.native import NATIVE, NativeTarget
from layerfs.bench.target import Target
from layerfs.driver import Mount, Usage
from layerfs.errors import FailedPrecondition, LayerfsError, NotFound, refused
from layerfs.store import Store
from layerfs.treecopy import remove_tree
from layerfs.walk import disk_usage

TMPFS = "tmpfs"
"""The kind of backing that is memory."""
_PREFIX = "layerfs-bench-"
_BESIDE_VOLUMES = ".native"  # drivers take no name with a dot for a volume


@dataclass(frozen=True)
class Device:
    """A block device that one driver's store is to stand on.

    Attributes:
        path: of it.
        force: whether it may hold data, which is lost then.
    """

    path: str
    force: bool = False


class Scratch:
    """A directory below ``place`` that is gone when the context ends, with every mount and loop device in it.

    What a killed run left in ``place`` is taken away as well.

    Args:
        kinds: for single targets, what to use instead of `StoreTarget`.
        device: what the driver stands on that is made first, and the native control beside it; of others there is none
            then.
    """

    def __init__(
        self,
        place: Path,
        interrupts: Interrupts,
        kinds: Mapping[str, type[StoreTarget]] = MappingProxyType({}),
        device: Device | None = None,
    ) -> None:
        self._kinds = kinds
        self._device = device
        self._beside: Path | None = None
        self._place = place
        self._interrupts = interrupts
        self._leaving = ExitStack()

    def __enter__(self) -> Self:
        _sweep(self._place)
        try:
            self.root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._place))
        except OSError as error:
            raise refused(f"making a scratch directory in {str(self._place)!r}", error) from error
        # Whatever fails on the way out (an interrupted workload may hold files open), the rest is still done.
        self._leaving.callback(take_away, self.root)
        lock = _locked(self.root)
        if lock is not None:
            self._leaving.callback(os.close, lock)
        self.shared = self.root / "shared"
        self.shared.mkdir()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self._leaving.close()
        except LayerfsError:
            if error is None:
                raise  # else what came first has to be told

    def target(self, name: str, filesystem: str | None, size: int) -> Target:
        """A new store, on a backing of ``filesystem`` (None: what the driver takes) of ``size``.

        Driver, options and a backing of its own are in the ``name`` (`layerfs.bench.target_name`). A driver that works
        on no plain file system keeps its own kind of backing, whatever ``filesystem`` is for the others. What is in
        memory, `TMPFS`, is no backing that a store could keep: then the whole store is there.
        """
        driver, own, options = target_name.parse(name)
        place, kind = self.root / name.replace(" ", "-"), own or filesystem
        if driver != NATIVE and own is None and not stands_on(driver, kind):
            kind = None
        if kind == TMPFS:
            place.mkdir()
            mounts.attach([Mount(TMPFS, "layerfs", (f"size={size}", "mode=0700"))], place)
            kind = DIRECTORY
        if driver == NATIVE:
            return NativeTarget(name, self._beside) if self._beside else self._native(name, place, kind, size)
        force = self._device is not None and self._device.force
        store = Store(place, driver, options=options, backing=self._spec(driver, kind, size), force=force)
        if self._device:
            self._leaving.callback(destroy, store.backing)
            self._beside = store.backing.path / _BESIDE_VOLUMES
        self._leaving.callback(store.close)
        self._leaving.callback(_empty, store)
        return self._kinds.get(name, StoreTarget)(name, store, self._interrupts)

    def _spec(self, driver: str, kind: str | None, size: int) -> BackingSpec | None:
        if self._device:
            return BackingSpec(kind or usual_filesystem(driver), device=self._device.path)
        return BackingSpec(kind, size=None if kind == DIRECTORY else size) if kind else None

    def _native(self, name: str, place: Path, filesystem: str | None, size: int) -> NativeTarget:
        if filesystem in (None, DIRECTORY):
            return NativeTarget(name, place)
        backing = Backing.create(place, BackingSpec(filesystem, size=size))
        self._leaving.callback(destroy, backing)
        backing.up()
        return NativeTarget(name, backing.path)


class StoreTarget(Target):
    """A driver as a target: each operation is the store's own, and none is cut by a signal."""

    def __init__(self, name: str, store: Store, interrupts: Interrupts) -> None:
        self.name = name
        self._store = store
        self._interrupts = interrupts

    def build(self, base: Base) -> None:
        key = f"filling {base.key}"
        self.create(key, None)
        tree = self.mount(key)
        with self._interrupts.allowed():
            base.fill(tree)
        top = base.key if base.depth == 1 else f"{base.key} 1"
        with self._interrupts.held():
            self._store.commit(top, key)
        for number in range(2, base.depth + 1):
            below, top = top, base.key if number == base.depth else f"{base.key} {number}"
            with self._interrupts.held():
                self._store.prepare(key, below)
                stack_up(self._store.mount(key), number)
                self._store.commit(top, key)

    def create(self, key: str, base: Base | None) -> None:
        with self._interrupts.held():
            self._store.prepare(key, base.key if base else "")

    def mount(self, key: str) -> Path:
        with self._interrupts.held():
            return self._store.mount(key)

    def unmount(self, key: str) -> None:
        with self._interrupts.held():
            self._store.unmount(key)

    def remove(self, key: str) -> None:
        with self._interrupts.held():
            self._store.remove(key)

    def discard(self, key: str) -> None:
        with self._interrupts.held(), contextlib.suppress(NotFound):
            self._store.remove(key)  # its mount goes with it

    def occupied(self, key: str) -> int:
        with self._interrupts.held():
            self.write_back()  # what is not written yet has no blocks, or not those that it will have
            return self._store.usage(key).size

    def write_back(self, *trees: Path) -> None:
        with self._interrupts.held():
            write_back(*trees, self._store.driver.root)

    def commit(self, key: str, name: str) -> None:
        with self._interrupts.held():
            self._store.commit(name, key)

    def held(self) -> int:
        if self._store.backing.spec.device:
            return -1
        with self._interrupts.held():
            write_back(self._store.driver.root, self._store.root)
            return _allocated(self._store.root).size

    def used(self) -> Usage:
        root = self._store.driver.root
        with self._interrupts.held():
            write_back(root)
            if os.stat(root).st_dev == os.stat(self._store.root).st_dev:  # with others on one disk
                return _allocated(self._store.root)
            space = os.statvfs(root)
            size = (space.f_blocks - space.f_bfree) * space.f_frsize
            fixed = str(storage(root).get("filesystem")).startswith("ext")  # xfs frees inodes later, btrfs has no count
            return Usage(size, space.f_files - space.f_ffree if fixed else -1)

    def apply(self, key: str, diff: BinaryIO) -> int:
        with self._interrupts.held():
            return self._store.apply(key, diff).size

    def diff(self, key: str, out: BinaryIO) -> int:
        with self._interrupts.held():
            return self._store.diff(key, out).size

    @property
    def most_mounted(self) -> int | None:
        return self._store.driver.most_mounted

    def facts(self) -> dict[str, object]:
        driver = self._store.driver
        return {
            "driver": driver.name,
            "options": driver.options,
            "capabilities": sorted(flag.name or "" for flag in driver.capabilities),
            "status": driver.status(),
            "backing": storage(driver.root),
        }


def usual_filesystem(driver: str) -> str:
    """The kind of backing that is made for a driver on a device, where none is asked for."""
    return next(iter(registry.load(driver).needs.filesystems), "ext4")


def stands_on(driver: str, filesystem: str | None) -> bool:
    """Whether the driver works on this kind of backing."""
    needed = registry.load(driver).needs.filesystems
    return filesystem is None or not needed or filesystem in needed


def destroy(backing: Backing) -> None:
    """Take a backing away. One that a mount namespace made meanwhile still shows goes when that does, as stores' do."""
    with contextlib.suppress(FailedPrecondition):
        backing.destroy()


def _allocated(root: Path) -> Usage:
    """What a directory holds on its own file system, without what is mounted in it."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return disk_usage(fd)
    finally:
        os.close(fd)


def _empty(store: Store) -> None:
    """Remove every layer, children before parents, with their mounts."""
    left = {layer.key: layer.parent for layer in store.list()}
    while left:
        for key in set(left) - set(left.values()):
            store.remove(key)
            del left[key]


def _locked(directory: Path) -> int | None:
    """Hold a directory for this process; None where another process does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(place: Path) -> None:
    """Take away what runs of this user left that were killed: their locks are free."""
    for left in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if left.lstat().st_uid == os.geteuid() and (lock := _locked(left)) is not None:
                try:
                    take_away(left)
                finally:
                    os.close(lock)


def take_away(root: Path) -> None:
    """Unmount everything below a scratch directory, the last mounted first, and remove it."""
    real = Path(os.path.realpath(root))
    for mount in reversed(mount_table.read()):
        if mount.target.is_relative_to(real):
            mounts.unmount(mount.target, lazy=True)
    parent = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(parent, root.name)
    finally:
        os.close(parent)
