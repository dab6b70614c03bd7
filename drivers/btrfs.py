"""btrfs: every layer is a subvolume, a child is a snapshot of it (btrfs-subvolume(8), by ioctl).

A sealed volume has the subvolume's read-only flag, so that not even root writes to it by accident.

What a volume changed is known from transaction numbers, without quota: a snapshot begins after the commit of one
transaction, and whatever its trees say with a later number is its own. A fork begins later than that, and so
``.since-VOLUME`` beside it keeps the number of the volume that it is a copy of.

Size limits are quota groups, which cost btrfs some speed; they are switched on with the first limit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from layerfs.beneath import directory
from layerfs.driver import BackingNeed, Capability, Probe, Problem, Usage
from layerfs.errors import Damaged, InvalidArgument, refused
from layerfs.kernel import btrfs
from layerfs.kernel.libc import check as checked
from layerfs.kernel.libc import encoded, libc
from layerfs.probing import filesystem_of, kernel_knows, nearest
from layerfs.snapshot import SnapshotDriver
from layerfs.treecopy import copy_tree, remove_tree
from layerfs.volume_dirs import VolumeDirs, opened

_SINCE = ".since-"
_FLAT = b".layerfs-flat-%d"

_LIMIT_KEY = 244  # BTRFS_QGROUP_LIMIT_KEY
_LIMIT_ITEM = struct.Struct("<5Q")  # flags, and the most bytes: referenced, exclusive, two more
_NO_LIMIT = (0, (1 << 64) - 1)

_INODE_TRANSID = struct.Struct("<8xQ")  # struct btrfs_inode_item
_EXTENT = struct.Struct("<QQ4xB")  # struct btrfs_file_extent_item: generation, size unpacked, …, type
_EXTENT_PLACE = struct.Struct("<QQ")  # and then, if it is not inline: address and size on disk
_INLINE = 0

_RENAME_EXCHANGE = 2

_NEARLY_FULL = 20
"""Less than this part of the file system is free: then removals wait until their space is."""
_PATIENCE = 15.0
"""Seconds that they wait at most."""


class BtrfsDriver(SnapshotDriver):
    """Subvolumes and snapshots of one btrfs file system."""

    name = "btrfs"
    needs = BackingNeed(("btrfs",), "layers are subvolumes")
    summary = "a layer is a subvolume, a child a snapshot of it"

    def __init__(self, root: Path, options: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(root, options)
        if options:
            raise InvalidArgument(f"btrfs has no options, and so no {', '.join(map(repr, sorted(options)))}")
        self._dirs = VolumeDirs(root, self._destroy)

    @classmethod
    def probe(cls, root: Path) -> Probe:
        if os.geteuid() != 0:
            return Probe(False, "deleting subvolumes and reading their trees takes root", "run it as root")
        place = nearest(root)
        if filesystem_of(place) == "btrfs":
            return _tried(place)
        if not kernel_knows("btrfs"):
            return Probe(False, "the kernel has no btrfs", "load its module: modprobe btrfs")
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        if shutil.which("mkfs.btrfs", path=path) is None:
            return Probe(False, "mkfs.btrfs is not installed", "apt-get install btrfs-progs")
        return Probe(True, "subvolumes of a btrfs in a sparse file, which layerfs makes")

    @property
    def capabilities(self) -> Capability:
        return Capability.SIZE_LIMIT | Capability.NATIVE_USAGE | Capability.BLOCK_COW

    def create(self, volume: str, parents: Sequence[str], *, size: int | None = None) -> None:
        """See `Driver.create`. A size limit counts what no other volume shares."""
        if self._dirs.exists(volume):
            return
        try:
            with self._dirs.made(volume) as place, opened(self.root) as root:
                if size is not None:
                    _switch_on_quota(root)
                if parents:
                    self._snapshot(parents[0], root, place.name)
                else:
                    btrfs.create(root, place.name)
                    place.chmod(0o755)
                if size is not None:
                    with opened(place) as fd:
                        btrfs.limit(fd, exclusive=size)
        except OSError as error:
            raise refused(f"making the volume {volume!r}", error) from error

    def fork(self, volume: str, source: str, parents: Sequence[str]) -> None:
        if self._dirs.exists(volume):
            return
        try:
            with self._dirs.made(volume) as place, opened(self.root) as root:
                if parents:
                    self._since_file(volume).write_text(str(self._since(source)))
                with opened(self.tree_path(source)) as old:
                    _flatten(old)
                self._snapshot(source, root, place.name)
                with opened(self.tree_path(source)) as old, opened(place) as new:
                    if (size := _limit_of(old)) is not None:
                        btrfs.limit(new, exclusive=size)
        except OSError as error:
            raise refused(f"copying the volume {source!r} to {volume!r}", error) from error

    def seal(self, volume: str, parents: Sequence[str]) -> None:  # noqa: ARG002
        """See `Driver.seal`. Subvolumes that a container made inside become directories: snapshots leave them out."""
        if not self._dirs.exists(volume):
            raise Damaged(f"sealing the volume {volume!r}: it does not exist; run `layerfs check`")
        try:
            with opened(self.tree_path(volume)) as fd:
                if btrfs.is_read_only(fd):
                    return
                _flatten(fd)
                btrfs.sync(fd)
                btrfs.set_read_only(fd, True)
        except OSError as error:
            raise refused(f"sealing the volume {volume!r}", error) from error

    def remove(self, volume: str) -> None:
        try:
            self._dirs.remove(volume)
            self._since_file(volume).unlink(missing_ok=True)
        except OSError as error:
            raise refused(f"removing the volume {volume!r}", error) from error

    def volumes(self) -> Iterator[str]:
        return self._dirs.names()

    def usage(self, volume: str, parents: Sequence[str]) -> Usage:
        """What the volume's own transactions wrote and still refer to; each extent once, compressed as it is."""
        try:
            with opened(self.tree_path(volume)) as fd:
                since = self._since(volume) if parents else -1
                _settle(fd)
                return _own_usage(fd, since)
        except OSError as error:
            raise refused(f"measuring the volume {volume!r}", error) from error

    def resize(self, volume: str, size: int) -> None:
        try:
            with opened(self.tree_path(volume)) as fd:
                _switch_on_quota(fd)
                btrfs.limit(fd, exclusive=size)
        except OSError as error:
            raise refused(f"limiting the size of the volume {volume!r}", error) from error

    def check(self, volume: str, parents: Sequence[str]) -> Iterator[Problem]:
        for name in (volume, *parents[:1]):
            try:
                with opened(self.tree_path(name)) as fd:
                    if not btrfs.is_subvolume(fd):
                        yield Problem(volume, f"{str(self.tree_path(name))!r} is no subvolume")
                    elif name != volume and not btrfs.is_read_only(fd):
                        yield Problem(volume, f"its parent {name!r} is not read-only", repairable=True)
            except FileNotFoundError:
                yield Problem(volume, f"the subvolume {str(self.tree_path(name))!r} is missing")

    def repair(self, volume: str, parents: Sequence[str]) -> None:  # noqa: ARG002
        for parent in parents[:1]:
            with contextlib.suppress(FileNotFoundError), opened(self.tree_path(parent)) as fd:
                btrfs.set_read_only(fd, True)

    def status(self) -> dict[str, str]:
        with opened(self.root) as fd:
            quota = btrfs.quota_group(fd, btrfs.info(fd).id) is not None
        return {"file system": "btrfs", "quota groups": "on" if quota else "off until a size limit is set"}

    def tree_path(self, volume: str) -> Path:
        return self._dirs.path(volume)

    def unchanged(
        self,
        volume: str,
        parents: Sequence[str],  # noqa: ARG002
    ) -> Callable[[os.stat_result, os.stat_result], bool] | None:
        """See `SnapshotDriver.unchanged`: an inode that no transaction since the snapshot has written."""
        with opened(self.tree_path(volume)) as fd:
            since = self._since(volume)
            _settle(fd)
            items = btrfs.search(fd, 0, types=(btrfs.INODE_ITEM_KEY, btrfs.INODE_ITEM_KEY), min_transid=since + 1)
            changed = {item.objectid for item in items if _INODE_TRANSID.unpack_from(item.data)[0] > since}
            device = os.fstat(fd).st_dev  # a subvolume inside has inodes with the same numbers
        return lambda old, new: old.st_ino == new.st_ino and new.st_dev == device and new.st_ino not in changed

    def _snapshot(self, source: str, root: int, name: str) -> None:
        with opened(self.tree_path(source)) as fd:
            btrfs.snapshot(fd, root, name)

    def _since_file(self, volume: str) -> Path:
        return self.root / f"{_SINCE}{volume}"

    def _since(self, volume: str) -> int:
        """The transaction with which the volume began as a snapshot of its parent."""
        try:
            return int(self._since_file(volume).read_text())
        except FileNotFoundError:
            with opened(self.tree_path(volume)) as fd:
                return btrfs.info(fd).created

    def _destroy(self, place: Path) -> None:
        try:
            with opened(place) as fd:
                number = btrfs.info(fd).id if btrfs.is_subvolume(fd) else None
        except FileNotFoundError:
            return
        with opened(place.parent) as root:
            if number is None:
                remove_tree(root, place.name)
                return
            btrfs.destroy(root, place.name)
            # Newer kernels (6.10) remove the group by themselves, once the last block is freed; until then it is busy.
            with contextlib.suppress(OSError):
                btrfs.destroy_quota_group(root, number)
            if _is_nearly_full(root):
                _wait_until_freed(root, number)


def _is_nearly_full(fd: int) -> bool:
    space = os.fstatvfs(fd)
    return space.f_bavail < space.f_blocks // _NEARLY_FULL


def _wait_until_freed(root: int, number: int) -> None:
    """Wait for the kernel's cleaner to give back the blocks of a deleted subvolume, at most a while."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        btrfs.sync(root)
        left = btrfs.search(root, btrfs.ROOT_TREE, objectids=(number, number), types=(btrfs.ROOT_ITEM_KEY,) * 2)
        if next(iter(left), None) is None:
            break
        time.sleep(0.05)
    btrfs.sync(root)  # what was freed can be used when that transaction is over


def _tried(place: Path) -> Probe:
    name = f".layerfs-probe-{os.getpid()}"
    try:
        with opened(place) as fd:
            btrfs.create(fd, name)
            btrfs.destroy(fd, name)
    except OSError as error:
        reason = f"a subvolume cannot be made in {str(place)!r}: {error.strerror}"
        return Probe(False, reason, "run it as root, on a btrfs that is mounted writable")
    return Probe(True, f"subvolumes of the btrfs at {str(place)!r}")


def _switch_on_quota(fd: int) -> None:
    if btrfs.quota_group(fd, btrfs.info(fd).id) is None:
        btrfs.enable_quota(fd)
        btrfs.wait_for_rescan(fd)


def _limit_of(fd: int) -> int | None:
    """The size limit of the subvolume ``fd``."""
    number = btrfs.info(fd).id
    try:
        for item in btrfs.search(fd, btrfs.QUOTA_TREE, objectids=(0, 0), types=(_LIMIT_KEY, _LIMIT_KEY)):
            if item.offset == number:
                limit = _LIMIT_ITEM.unpack_from(item.data)[2]
                return None if limit in _NO_LIMIT else limit
    except OSError as error:
        if error.errno != errno.ENOENT:  # quota is off
            raise
    return None


def _settle(fd: int) -> None:
    """Bring what was written into the trees. A read-only subvolume has nothing to bring."""
    if not btrfs.is_read_only(fd):
        btrfs.sync(fd)


def _own_usage(fd: int, since: int) -> Usage:
    size = inodes = 0
    extents: set[int] = set()
    kinds = (btrfs.INODE_ITEM_KEY, btrfs.EXTENT_DATA_KEY)
    for item in btrfs.search(fd, 0, types=kinds, min_transid=since + 1):
        if item.type == btrfs.INODE_ITEM_KEY:
            inodes += _INODE_TRANSID.unpack_from(item.data)[0] > since
        elif item.type == btrfs.EXTENT_DATA_KEY:
            generation, unpacked, kind = _EXTENT.unpack_from(item.data)
            if generation <= since:
                continue
            if kind == _INLINE:
                size += unpacked
                continue
            address, length = _EXTENT_PLACE.unpack_from(item.data, _EXTENT.size)
            if address and address not in extents:  # 0 is a hole
                extents.add(address)
                size += length
    return Usage(size, inodes)


def _flatten(fd: int) -> None:
    """Make plain directories of the subvolumes inside the subvolume ``fd``; where it was interrupted, it goes on."""
    for path, name in btrfs.nested(fd):
        with directory(fd, b"" if path == b"." else path) as parent:
            times = os.fstat(parent)
            with directory(parent, name) as inner:
                flat = _FLAT % btrfs.info(inner).id
                if name != flat:
                    remove_tree(parent, flat)
                    os.mkdir(flat, 0o700, dir_fd=parent)
                    with directory(parent, flat) as copy:
                        copy_tree(inner, copy)
                    _exchange(parent, name, flat)
            btrfs.destroy(parent, flat)
            os.utime(parent, ns=(times.st_atime_ns, times.st_mtime_ns))


def _exchange(dir_fd: int, one: bytes, two: bytes) -> None:
    """Let two names change places in one step, see rename(2)."""
    checked(libc.renameat2(dir_fd, encoded(one), dir_fd, encoded(two), _RENAME_EXCHANGE), path=one)
