"""What union drivers share: a volume is a directory that holds only what it changes against its parents.

Below the driver's root, ``VOLUME/u`` is the upper directory and ``VOLUME/w`` the union's own work directory, which goes
when the volume is sealed. A volume without parents has no work directory: it is written to as the plain directory that
it is. The names are short because mount options are.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from layerfs import project_limits
from layerfs.changes import compare, compare_upper
from layerfs.driver import Capability, Change, Driver, Mount, Problem, Upper, Usage, Whiteouts
from layerfs.errors import Damaged, refused
from layerfs.kernel import quota
from layerfs.treecopy import copy_attributes, copy_tree, remove_tree
from layerfs.volume_dirs import VolumeDirs, opened
from layerfs.walk import disk_usage, uncache

UPPER, WORK = "u", "w"
_EMPTY = "e"
"""An empty lower layer: a volume without parents that has a size limit is a union too, see `UnionDriver.create`."""
_GONE = "x"


class UnionDriver(Driver):
    """A driver whose volumes hold what they change, in a dialect of whiteouts and opaque directories of its own."""

    limits_size = True
    """Whether the union holds its users to the project quota of the file system that it lies on."""

    def __init__(self, root: Path, options: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(root, options)
        self._dirs = VolumeDirs(root, self._destroy)
        self._quota: bool | None = None

    # What each union says for itself

    @property
    @abstractmethod
    def whiteouts(self) -> Whiteouts:
        """The dialect in which deletions are marked in an upper directory."""

    @abstractmethod
    def hidden_by(self, dir_fd: int, name: bytes, info: os.stat_result) -> bytes | None:
        """The name that the entry ``name`` of an upper's directory ``dir_fd`` hides in lower layers.

        None if it is no whiteout; ``b""`` if it hides nothing, but is not for users either. `os.lstat` says ``info``.
        """

    @abstractmethod
    def is_opaque(self, dir_fd: int) -> bool:
        """Whether a directory of an upper hides all that lower layers hold in it."""

    @abstractmethod
    def union(self, volume: str, lowers: Sequence[Path], *, read_only: bool) -> list[Mount]:
        """The mounts of the volume's upper over ``lowers``, nearest first."""

    @property
    def native_changes(self) -> bool:
        """Whether an upper directory alone tells all that its volume changes."""
        return True

    def is_complete(self, volume: str) -> bool:  # noqa: ARG002
        """Whether what the volume shows is all in its upper and its parents, and nothing in the work directory."""
        return True

    def complete(self, volume: str, parents: Sequence[str]) -> None:
        """Bring into the upper what is elsewhere. The volume is not mounted."""

    # The interface

    @property
    def capabilities(self) -> Capability:
        found = Capability.UPPER
        if self.native_changes:
            found |= Capability.NATIVE_CHANGES
        if self._can_limit():
            found |= Capability.SIZE_LIMIT
        return found

    def create(self, volume: str, parents: Sequence[str], *, size: int | None = None) -> None:
        """See `Driver.create`.

        A size limit counts the work directory too. Without parents it makes the volume a union over an empty directory,
        because ext4 holds root to a limit only where root writes through a union.
        """
        if self._dirs.exists(volume):
            return
        if size is not None and not self._can_limit():
            raise project_limits.refuse(self.name)
        try:
            with self._dirs.made(volume) as place:
                self._skeleton(place, parents, size)
                upper = place / UPPER
                upper.mkdir()
                if parents:
                    with opened(self.upper_path(parents[0])) as old, opened(upper) as new:
                        copy_attributes(old, new)
                else:
                    upper.chmod(0o755)
        except OSError as error:
            raise refused(f"making the volume {volume!r}", error) from error

    def fork(self, volume: str, source: str, parents: Sequence[str]) -> None:
        if self._dirs.exists(volume):
            return
        self.complete(source, parents)
        try:
            with self._dirs.made(volume) as place:
                self._skeleton(place, parents, self._limit(source))
                (place / UPPER).mkdir()
                with opened(self.upper_path(source)) as old, opened(place / UPPER) as new:
                    copy_tree(old, new)
                    self.disown(new)
        except OSError as error:
            raise refused(f"copying the volume {source!r} to {volume!r}", error) from error

    def disown(self, upper: int) -> None:
        """Take from a copied upper what the union noted about the very inodes that it was copied from."""

    def seal(self, volume: str, parents: Sequence[str]) -> None:
        place = self._dirs.path(volume)
        if not place.exists():
            raise Damaged(f"sealing the volume {volume!r}: it does not exist; run `layerfs check`")
        try:
            if (place / WORK).exists():
                self.complete(volume, parents)
                os.rename(place / WORK, place / _GONE)
            with opened(place) as fd:
                if not _is_hollow(place / _GONE):
                    remove_tree(fd, _GONE)
                remove_tree(fd, _EMPTY)
        except OSError as error:
            raise refused(f"sealing the volume {volume!r}", error) from error

    def remove(self, volume: str) -> None:
        try:
            self._dirs.remove(volume)
        except OSError as error:
            raise refused(f"removing the volume {volume!r}", error) from error

    def mounts(self, volume: str, parents: Sequence[str], *, read_only: bool = False) -> list[Mount]:
        lowers = [self.upper_path(parent) for parent in parents]
        if not lowers and not read_only and self._empty(volume).exists():
            lowers = [self._empty(volume)]
        if not lowers:
            return [Mount("bind", str(self.upper_path(volume)), ("bind", "ro" if read_only else "rw"))]
        return self.union(volume, lowers, read_only=read_only)

    def volumes(self) -> Iterator[str]:
        return self._dirs.names()

    def usage(self, volume: str, parents: Sequence[str]) -> Usage:  # noqa: ARG002
        """What the upper directory holds: allocated blocks, each inode once."""
        with opened(self.upper_path(volume)) as fd:
            return disk_usage(fd)

    def changes(self, volume: str, parents: Sequence[str], old: int | None, new: int) -> Iterator[Change]:
        if not parents or old is None or not self.native_changes or not self.is_complete(volume):
            yield from compare(old, new)
            return
        with opened(self.upper_path(volume)) as upper:
            yield from compare_upper(old, new, upper, self.hidden_by, self.is_opaque)

    def upper(self, volume: str) -> Upper | None:
        """The upper directory, but for a volume without parents, which a diff can be applied to as it is."""
        if not self.work_path(volume).exists() or self._empty(volume).exists():
            return None
        return Upper(self.upper_path(volume), self.whiteouts)

    def resize(self, volume: str, size: int) -> None:
        if not self._can_limit():
            raise project_limits.refuse(self.name)
        project_limits.set_limit(self._dirs.path(volume), size)

    def check(self, volume: str, parents: Sequence[str]) -> Iterator[Problem]:
        for name in (volume, *parents):
            if not self.upper_path(name).is_dir():
                yield Problem(volume, f"the directory {str(self.upper_path(name))!r} is missing")

    def uncache(self, volume: str, parents: Sequence[str]) -> None:  # noqa: ARG002
        with opened(self.upper_path(volume)) as upper:
            uncache(upper)

    def upper_path(self, volume: str) -> Path:
        return self._dirs.path(volume) / UPPER

    def work_path(self, volume: str) -> Path:
        return self._dirs.path(volume) / WORK

    def _empty(self, volume: str) -> Path:
        return self._dirs.path(volume) / _EMPTY

    def _skeleton(self, place: Path, parents: Sequence[str], size: int | None) -> None:
        """Make a volume's directory with all but its upper. The limit comes first: what is made later inherits it."""
        place.mkdir(mode=0o700)
        if size is not None:
            project_limits.set_limit(place, size)
        if parents or size is not None:
            (place / WORK).mkdir(mode=0o700)
        if not parents and size is not None:
            (place / _EMPTY).mkdir(mode=0o755)

    def _limit(self, volume: str) -> int | None:
        return project_limits.limit_of(self._dirs.path(volume)) if self._can_limit() else None

    def _can_limit(self) -> bool:
        if self._quota is None:
            self._quota = self.limits_size and quota.supported(self.root)
        return self._quota

    def _destroy(self, place: Path) -> None:
        if not place.exists():
            return
        if self._can_limit():
            project_limits.release(place)
        with opened(place.parent) as fd:
            remove_tree(fd, place.name)


def _is_hollow(directory: Path) -> bool:
    """Whether there is nothing but empty directories in it, which may go with the volume: removing some takes long."""
    try:
        with os.scandir(directory) as entries:
            return all(entry.is_dir(follow_symlinks=False) and not os.listdir(entry.path) for entry in entries)
    except FileNotFoundError:
        return False
