"""vfs: every layer is a whole copy of its parent. Slow and large, but it works on any file system.

Where the file system shares blocks between files (xfs, btrfs: reflink), a copy costs only its inodes.

``VOLUME/t`` is the tree. ``VOLUME/copied`` holds the change times (ns) of two files made just before and just after the
tree was copied from the parent: an inode whose change time lies between them has not been touched since, because nobody
can set that time. It lets a comparison with the parent pass over what is the same without reading it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from layerfs import project_limits
from layerfs.beneath import directory
from layerfs.changes import compare
from layerfs.driver import Capability, Change, Probe, Problem, Usage
from layerfs.errors import Damaged, InvalidArgument, refused
from layerfs.kernel import quota
from layerfs.kernel.clone import reflink
from layerfs.kernel.fiemap import extents
from layerfs.probing import filesystem_of, nearest
from layerfs.snapshot import SnapshotDriver
from layerfs.treecopy import copy_tree, remove_tree
from layerfs.volume_dirs import VolumeDirs, opened
from layerfs.walk import disk_usage, walk

_TREE, _COPIED = "t", "copied"


class VfsDriver(SnapshotDriver):
    """Full copies in plain directories."""

    name = "vfs"
    summary = "a layer is a directory, a child a full copy of it (reflink where the file system can)"

    def __init__(self, root: Path, options: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(root, options)
        if options:
            raise InvalidArgument(f"vfs has no options, and so no {', '.join(map(repr, sorted(options)))}")
        self._dirs = VolumeDirs(root, self._destroy)
        self._capabilities: Capability | None = None

    @classmethod
    def probe(cls, root: Path) -> Probe:
        place = nearest(root)
        if not os.access(place, os.W_OK | os.X_OK):
            return Probe(False, f"{str(place)!r} cannot be written to", "choose another --root")
        how = "blocks shared (reflink)" if _shares_blocks(place) else "every block copied"
        return Probe(True, f"plain directories on {filesystem_of(place)}, {how}")

    @property
    def capabilities(self) -> Capability:
        if self._capabilities is None:
            self._capabilities = Capability.ROOTLESS
            if _shares_blocks(self.root):
                self._capabilities |= Capability.BLOCK_COW
            # ext4 does not hold root to a project's limit, and nothing stands between root and the file system here.
            if quota.supported(self.root) and filesystem_of(self.root) == "xfs":
                self._capabilities |= Capability.SIZE_LIMIT
        return self._capabilities

    def create(self, volume: str, parents: Sequence[str], *, size: int | None = None) -> None:
        """See `Driver.create`. A size limit counts the whole tree, for that is what the volume holds."""
        if self._dirs.exists(volume):
            return
        if size is not None and Capability.SIZE_LIMIT not in self.capabilities:
            raise project_limits.refuse(self.name)
        try:
            with self._dirs.made(volume) as place:
                tree = _skeleton(place, size)
                if parents:
                    _copy(self.tree_path(parents[0]), tree, place / _COPIED)
                else:
                    tree.chmod(0o755)
        except OSError as error:
            raise refused(f"making the volume {volume!r}", error) from error

    def fork(self, volume: str, source: str, parents: Sequence[str]) -> None:
        if self._dirs.exists(volume):
            return
        limited = Capability.SIZE_LIMIT in self.capabilities
        size = project_limits.limit_of(self._dirs.path(source)) if limited else None
        try:
            with self._dirs.made(volume) as place:
                tree = _skeleton(place, size)
                _copy(self.tree_path(source), tree, place / _COPIED)
                known = self.unchanged(source, parents)
                if known is None:
                    (place / _COPIED).unlink()
                else:
                    _touch_changed(self.tree_path(source), tree, known)
        except OSError as error:
            raise refused(f"copying the volume {source!r} to {volume!r}", error) from error

    def seal(self, volume: str, parents: Sequence[str]) -> None:  # noqa: ARG002
        """Nothing marks a sealed volume: the store mounts it read-only from now on."""
        if not self._dirs.exists(volume):
            raise Damaged(f"sealing the volume {volume!r}: it does not exist; run `layerfs check`")

    def remove(self, volume: str) -> None:
        try:
            self._dirs.remove(volume)
        except OSError as error:
            raise refused(f"removing the volume {volume!r}", error) from error

    def volumes(self) -> Iterator[str]:
        return self._dirs.names()

    def usage(self, volume: str, parents: Sequence[str]) -> Usage:
        """What the tree occupies, without the blocks that its files share with their parent's of the same name."""
        with opened(self.tree_path(volume)) as fd:
            whole = disk_usage(fd)
            if not parents or Capability.BLOCK_COW not in self.capabilities:
                return whole
            with opened(self.tree_path(parents[0])) as parent:
                return Usage(whole.size - _shared(parent, fd, self.unchanged(volume, parents)), whole.inodes)

    def resize(self, volume: str, size: int) -> None:
        if Capability.SIZE_LIMIT not in self.capabilities:
            raise project_limits.refuse(self.name)
        project_limits.set_limit(self._dirs.path(volume), size)

    def changes(self, volume: str, parents: Sequence[str], old: int | None, new: int) -> Iterator[Change]:
        known = None if old is None else self.unchanged(volume, parents)
        yield from compare(old, new, unchanged=known, unchanged_places=False)

    def check(self, volume: str, parents: Sequence[str]) -> Iterator[Problem]:  # noqa: ARG002
        if not self.tree_path(volume).is_dir():
            yield Problem(volume, f"the directory {str(self.tree_path(volume))!r} is missing")

    def status(self) -> dict[str, str]:
        shared = Capability.BLOCK_COW in self.capabilities
        return {"file system": filesystem_of(self.root), "copies": "share blocks (reflink)" if shared else "in full"}

    def tree_path(self, volume: str) -> Path:
        return self._dirs.path(volume) / _TREE

    def unchanged(
        self,
        volume: str,
        parents: Sequence[str],  # noqa: ARG002
    ) -> Callable[[os.stat_result, os.stat_result], bool] | None:
        try:
            first, last = map(int, (self._dirs.path(volume) / _COPIED).read_text().split())
        except FileNotFoundError:
            return None
        if time.time_ns() < last:  # the clock was set back: change times mean nothing
            return None
        return lambda _, new: first <= new.st_ctime_ns <= last

    def _destroy(self, place: Path) -> None:
        if not place.exists():
            return
        if Capability.SIZE_LIMIT in self.capabilities:
            project_limits.release(place)
        with opened(place.parent) as fd:
            remove_tree(fd, place.name)


def _skeleton(place: Path, size: int | None) -> Path:
    """Make a volume's directory and an empty tree in it. The limit comes first: what is made later inherits it."""
    place.mkdir(mode=0o700)
    if size is not None:
        project_limits.set_limit(place, size)
    tree = place / _TREE
    tree.mkdir()
    return tree


def _copy(source: Path, target: Path, times: Path) -> None:
    """Copy a tree, and write down between which change times that was."""
    first = _now(times)
    with opened(source) as old, opened(target) as new:
        copy_tree(old, new)
    last = _now(times)
    while _now(times) == last:  # what is changed from here on has a later change time, however coarse the clock is
        time.sleep(0.0005)
    times.write_text(f"{first} {last}\n")


def _now(file: Path) -> int:
    """The time by the clock of the file system, which is coarser than the system's."""
    file.touch()
    return file.stat().st_ctime_ns


def _touch_changed(source: Path, copy: Path, unchanged: Callable[[os.stat_result, os.stat_result], bool]) -> None:
    """Give all that had been changed in ``source`` a change time in ``copy`` that says so."""
    with opened(source) as old, opened(copy) as new:
        for path, fd, entries in walk(old):
            with directory(new, path) as copied:
                _touch_where(os.fstat(fd), copied, ".", unchanged)
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        _touch_where(entry.stat(follow_symlinks=False), copied, entry.name, unchanged)


def _touch_where(
    info: os.stat_result, dir_fd: int, name: str, unchanged: Callable[[os.stat_result, os.stat_result], bool]
) -> None:
    if not unchanged(info, info):
        os.utime(name, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=dir_fd, follow_symlinks=False)


def _shared(old: int, new: int, unchanged: Callable[[os.stat_result, os.stat_result], bool] | None) -> int:
    """The bytes of blocks that regular files of the tree ``new`` share with those of the tree ``old``."""
    size = 0
    seen: set[int] = set()
    for path, fd, entries in walk(new):
        files = [entry for entry in entries if entry.is_file(follow_symlinks=False) and entry.inode() not in seen]
        with contextlib.suppress(OSError), directory(old, path) as old_fd:  # a new directory
            for entry in files:
                info = entry.stat(follow_symlinks=False)
                seen.add(info.st_ino)
                if unchanged is not None and unchanged(info, info):
                    size += info.st_blocks * 512
                else:
                    size += _shared_by(old_fd, fd, entry.name)
    return size


def _shared_by(old: int, new: int, name: str) -> int:
    """The bytes of blocks that the file ``name`` has in common in two directories."""
    try:
        places = [_places(old, name), _places(new, name)]
    except OSError:  # another type in the parent, or nothing; or a file system that does not tell
        return 0
    size = 0
    one, two = (sorted(place) for place in places)
    while one and two:
        (first, first_end), (second, second_end) = one[-1], two[-1]
        size += max(0, min(first_end, second_end) - max(first, second))
        (one if first >= second else two).pop()
    return size


def _places(dir_fd: int, name: str) -> list[tuple[int, int]]:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return [(start, start + length) for start, length in extents(fd)]
    finally:
        os.close(fd)


def _shares_blocks(place: Path) -> bool:
    """Whether the file system can share a file's blocks with a copy, by trying."""
    try:
        with tempfile.TemporaryFile(dir=place) as one, tempfile.TemporaryFile(dir=place) as two:
            one.write(bytes(4096))
            one.flush()
            return reflink(one.fileno(), two.fileno())
    except OSError:
        return False
