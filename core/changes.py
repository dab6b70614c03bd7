"""What differs between two trees: one rule for all drivers, so that the same two trees give the same changes.

The rule:

- A path is MODIFIED if its type, mode, owner, device number, link target, size, modification time (in nanoseconds),
  kept extended attributes (`layerfs.xattrs`) or content differ; so is a directory, by all of these but its size.
- A path of another type than before is MODIFIED, and nothing is said of what was below it. A deleted directory is one
  change. A directory that was deleted and made again is compared like any other, child by child.
- All that is below an added directory is ADDED. Without a parent the whole tree is, its root included.
- Hard links: a path in both trees, no directory, is MODIFIED too if the names of its inode are not those that the
  parent has for it, leaving aside those that were deleted or are changed by themselves. So a new link lists all the
  names of its inode, and what is listed is enough to make the links anew.
- Sockets do not exist.
- Order: depth first, the names of a directory sorted bytewise, a directory before what is in it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Final, NamedTuple

from layerfs import xattrs
from layerfs.beneath import Directories, directory, names
from layerfs.driver import Change, ChangeKind
from layerfs.errors import refused

_Inode = tuple[int, int]  # device and number

Unchanged = Callable[[os.stat_result, os.stat_result], bool]
"""Says of a path's status in the old and the new tree that it surely is the same inode with the same content."""

HiddenBy = Callable[[int, bytes, os.stat_result], bytes | None]
"""Says which name an entry of a union's upper directory hides, see `compare_upper`."""

_ADDED, _MODIFIED, _DELETED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.DELETED
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK: Final = 1 << 19


def compare(
    old: int | None,
    new: int,
    *,
    unchanged: Unchanged | None = None,
    unchanged_attributes: bool = True,
    unchanged_places: bool = True,
) -> Iterator[Change]:
    """The changes from the tree ``old`` to the tree ``new``, in canonical order, by walking both.

    Args:
        old, new: directory descriptors; None stands for no tree at all.
        unchanged: spares attributes and content of a path from being read where it returns True.
        unchanged_attributes: False where it says nothing of the extended attributes.
        unchanged_places: False where it says that an inode is as it was, but not which one it was. A directory can have
            come from elsewhere then with all that is in it, and if so, it and the one that it is in now are changed.

    Raises `LayerfsError`, naming the path that could not be read.
    """
    if old is None:
        return itertools.chain([Change(_ADDED, b"")], _added(new, None, b""))
    return _Comparison(old, new, unchanged, unchanged_attributes, unchanged_places).changes()


def compare_upper(
    old: int,
    new: int,
    upper: int,
    hidden_by: HiddenBy,
    is_opaque: Callable[[int], bool],
) -> Iterator[Change]:
    """The same changes as `compare`, found by walking only what a union's upper directory holds.

    Only right where a path that the upper directory lacks is the same in both trees: not with overlay's redirects.
    Both trees are walked after all where hard links have names outside the upper directory.

    Args:
        old, new: directory descriptors of the parent's tree and of the union of it and ``upper``.
        upper: directory descriptor of the union's own directory.
        hidden_by: which name the entry of this name and status in this directory of the upper hides; None if it is no
            whiteout, ``b""`` if it is none but the union's own all the same.
        is_opaque: whether this directory of the upper hides all that lower layers have in it.
    """
    try:
        return _GuidedByUpper(old, new, upper, hidden_by, is_opaque).changes()
    except _LinksElsewhere:
        return compare(old, new, unchanged=_same_inode)


def compare_paths(
    old: int, new: int, paths: Iterable[bytes], *, unchanged: Unchanged | None = None
) -> Iterator[Change]:
    """The same changes as `compare`, found by looking only at what may have changed.

    Only right where the new tree began as a copy of the old one with the same inode numbers. Both trees are walked
    after all where hard links have names elsewhere.

    Args:
        old, new: directory descriptors.
        paths: one path at least of every inode that is new, gone or written to, without a leading slash; ``b""`` is the
            root. A directory is written to by each change of the names in it.
        unchanged: as in `compare`, for walking.
    """
    try:
        return _GuidedByPaths(old, new, paths).changes()
    except _LinksElsewhere:
        return compare(old, new, unchanged=unchanged)


def _same_inode(old: os.stat_result, new: os.stat_result) -> bool:
    """Copying up makes a new inode with a new change time, which nobody can set."""
    return old.st_ino == new.st_ino and old.st_ctime_ns == new.st_ctime_ns


class _LinksElsewhere(Exception):
    """The upper directory alone does not tell which names an inode has, or had."""


class _Visit(NamedTuple):
    """A directory whose entries are still to be looked at."""

    look: Callable[[bytes], list[Change | _Visit]]
    path: bytes


def _walk(first: list[Change | _Visit]) -> Iterator[Change]:
    """The changes that visits lead to, in order, without recursion."""
    todo = first[::-1]
    while todo:
        item = todo.pop()
        if isinstance(item, Change):
            yield item
        else:
            todo += item.look(item.path)[::-1]


class _Links:
    """Names of inodes that have, or had, more than one."""

    def __init__(self) -> None:
        self._old: dict[_Inode, set[bytes]] = {}
        self._new: dict[_Inode, set[bytes]] = {}
        self._missing: dict[_Inode, int] = {}
        self._had_several = False
        self._same: dict[bytes, tuple[_Inode, _Inode]] = {}

    def add(self, path: bytes, was: os.stat_result | None, now: os.stat_result, *, changed: bool) -> None:
        """Note a path that ``now`` is no directory; ``was`` is None where it is new, or was of another type."""
        inode = _inode(now)
        self._new.setdefault(inode, set()).add(path)
        self._missing[inode] = self._missing.get(inode, now.st_nlink) - 1
        if was is not None:
            before = _inode(was)
            self._old.setdefault(before, set()).add(path)
            if was.st_nlink > 1:
                self._had_several = True
            if not changed:
                self._same[path] = (before, inode)

    def complete(self) -> bool:
        """Whether every name that these inodes have is known, and none of them had several before."""
        return not (self._had_several or any(self._missing.values()))

    def regrouped(self) -> list[bytes]:
        """Paths that are the same by themselves, but not linked to what they were linked to."""
        different = {
            (before, inode)
            for before, inode in set(self._same.values())
            if self._new[inode] != {path for path in self._old[before] if path in self._same}
        }
        return [path for path, inodes in self._same.items() if inodes in different]


class _Comparison:
    """One comparison of two trees."""

    def __init__(
        self,
        old: int,
        new: int,
        unchanged: Unchanged | None,
        unchanged_attributes: bool = True,
        unchanged_places: bool = True,
    ) -> None:
        self._old = old
        self._new = new
        self._unchanged = unchanged
        self._unchanged_attributes = unchanged_attributes
        self._unchanged_places = unchanged_places
        self._links = _Links()

    def changes(self) -> Iterator[Change]:
        first: list[Change | _Visit] = []
        with _reported(b""), directory(self._old, b"") as old, directory(self._new, b"") as new:
            if self._differ(old, new, b".", os.fstat(old), os.fstat(new)):
                first.append(Change(_MODIFIED, b""))
        found = list(_walk([*first, _Visit(self._look, b"")]))
        if regrouped := self._links.regrouped():
            found += (Change(_MODIFIED, path) for path in regrouped)
            found.sort(key=_order)
        return iter(found)

    def _look(self, path: bytes) -> list[Change | _Visit]:
        """A directory that both trees have."""
        return self._look_everywhere(path)

    def _look_everywhere(self, path: bytes, *, moved: bool = False) -> list[Change | _Visit]:
        """A directory that both trees have; ``moved``: it may have been elsewhere in the old one, with all in it."""
        items: list[Change | _Visit] = []
        with _reported(path), directory(self._old, path) as old, directory(self._new, path) as new:
            takes_in = not self._unchanged_places and not self._is_unchanged(os.fstat(old), os.fstat(new))
            there, here = frozenset(names(old)), frozenset(names(new))
            for name in sorted(there | here):
                was = _status(old, name) if name in there else None
                now = _status(new, name) if name in here else None
                came = takes_in and was is not None and now is not None and not self._is_unchanged(was, now)
                look = partial(self._look_everywhere, moved=moved or came)
                items += self._entry(_joined(path, name), (old, was), (new, now), look, moved=moved)
        return items

    def _is_unchanged(self, was: os.stat_result, now: os.stat_result) -> bool:
        return self._unchanged is not None and self._unchanged(was, now)

    def _entry(
        self,
        path: bytes,
        before: tuple[int, os.stat_result | None],
        after: tuple[int, os.stat_result | None],
        look: Callable[[bytes], list[Change | _Visit]],
        *,
        moved: bool = False,
    ) -> Iterator[Change | _Visit]:
        """What has become of one path.

        ``before`` and ``after`` are its directory's descriptor and its status; ``look`` visits it where it is a
        directory in both trees; ``moved``: it may have been elsewhere in the old tree.
        """
        (old, was), (new, now) = before, after
        if now is None:
            if was is not None:
                yield Change(_DELETED, path)
                self._gone(path, was)
            return
        is_directory = stat.S_ISDIR(now.st_mode)
        if was is not None and stat.S_IFMT(was.st_mode) == stat.S_IFMT(now.st_mode):
            changed = self._differ(old, new, path.rpartition(b"/")[2], was, now, moved=moved)
            if changed:
                yield Change(_MODIFIED, path)
            if is_directory:
                yield _Visit(look, path)
            elif was.st_nlink > 1 or now.st_nlink > 1:
                self._links.add(path, was, now, changed=changed)
            return
        if was is None:
            yield Change(_ADDED, path)
        else:
            yield Change(_MODIFIED, path)
            self._gone(path, was)
        if is_directory:
            yield from _added(self._new, self._links, path)
        elif now.st_nlink > 1:
            self._links.add(path, None, now, changed=True)

    def _gone(self, path: bytes, was: os.stat_result) -> None:
        """A path of the old tree that the new one does not have, or has as another type."""

    def _differ(
        self, old: int, new: int, name: bytes, was: os.stat_result, now: os.stat_result, *, moved: bool = False
    ) -> bool:
        """Whether two inodes of one type differ."""
        if (
            was.st_mtime_ns != now.st_mtime_ns
            or was.st_mode != now.st_mode
            or was.st_uid != now.st_uid
            or was.st_gid != now.st_gid
        ):
            return True
        kind = stat.S_IFMT(now.st_mode)
        if kind != stat.S_IFDIR and (was.st_size != now.st_size or was.st_rdev != now.st_rdev):
            return True
        same = not moved and self._is_unchanged(was, now)
        if same and self._unchanged_attributes:
            return False
        if xattrs.read(b"/proc/self/fd/%d/%s" % (old, name)) != xattrs.read(b"/proc/self/fd/%d/%s" % (new, name)):
            return True
        if same:
            return False
        if kind == stat.S_IFLNK:
            return os.readlink(name, dir_fd=old) != os.readlink(name, dir_fd=new)
        return kind == stat.S_IFREG and now.st_size > 0 and not _same_content(old, new, name, now.st_size)


class _Guided(_Comparison):
    """A comparison that passes over what cannot differ; `_look` knows what can."""

    def __init__(self, old: int, new: int) -> None:
        super().__init__(old, new, None)

    def changes(self) -> Iterator[Change]:
        found = super().changes()
        if not self._links.complete():
            raise _LinksElsewhere
        return found

    def _gone(self, path: bytes, was: os.stat_result) -> None:
        """Other names of what is gone may be anywhere, and have changed with it."""
        if stat.S_ISDIR(was.st_mode):
            links = _Links()
            for _ in _added(self._old, links, path):
                pass  # only its links matter
            if links.complete():
                return
        elif was.st_nlink == 1:
            return
        raise _LinksElsewhere


class _GuidedByPaths(_Guided):
    """A comparison that looks at given paths alone."""

    def __init__(self, old: int, new: int, paths: Iterable[bytes]) -> None:
        super().__init__(old, new)
        self._paths = set(paths)
        self._names: dict[bytes, set[bytes]] = {}
        for path in self._paths:
            while path:
                above, _, name = path.rpartition(b"/")
                known = self._names.setdefault(above, set())
                if name in known:
                    break
                known.add(name)
                path = above

    def _look(self, path: bytes) -> list[Change | _Visit]:
        """A directory that both trees have, as the same inode."""
        items: list[Change | _Visit] = []
        with _reported(path), directory(self._old, path) as old, directory(self._new, path) as new:
            names = set(self._names.get(path, ()))
            if path in self._paths:
                names |= {name for name, _ in _numbered(old) ^ _numbered(new)}
            for name in sorted(names):
                was, now = _status(old, name), _status(new, name)
                moved = was is not None and now is not None and was.st_ino != now.st_ino
                look = self._look_everywhere if moved else self._look
                items += self._entry(_joined(path, name), (old, was), (new, now), look)
        return items


class _GuidedByUpper(_Guided):
    """A comparison that passes over what a union's upper directory does not have."""

    def __init__(
        self,
        old: int,
        new: int,
        upper: int,
        hidden_by: HiddenBy,
        is_opaque: Callable[[int], bool],
    ) -> None:
        super().__init__(old, new)
        self._upper = upper
        self._hidden_by = hidden_by
        self._is_opaque = is_opaque

    def _look(self, path: bytes) -> list[Change | _Visit]:
        """A directory that both trees have, and the upper directory too."""
        items: list[Change | _Visit] = []
        with _reported(path), directory(self._upper, path) as upper:
            if self._is_opaque(upper):
                return self._look_everywhere(path)
            with directory(self._old, path) as old, directory(self._new, path) as new:
                for name, hidden in sorted(self._held(upper).items()):
                    now = None if hidden else _status(new, name)
                    items += self._entry(_joined(path, name), (old, _status(old, name)), (new, now), self._look)
        return items

    def _held(self, upper: int) -> dict[bytes, bool]:
        """The names that a directory of the upper says something of, and whether that they are hidden."""
        held: dict[bytes, bool] = {}
        for name in names(upper):
            status = _status(upper, name)
            hidden = None if status is None else self._hidden_by(upper, name, status)
            if hidden is None:
                held[name] = False
            elif hidden:
                held.setdefault(hidden, True)  # an entry of the same layer is not hidden
        return held


def _added(new: int, links: _Links | None, path: bytes) -> Iterator[Change]:
    """All that is in a directory which only the tree ``new`` has."""
    with contextlib.closing(Directories(new)) as directories:
        todo = _content(directories, path, links)
        while todo:
            path, is_directory = todo.pop()
            yield Change(_ADDED, path)
            if is_directory:
                todo += _content(directories, path, links)


def _content(directories: Directories, path: bytes, links: _Links | None) -> list[tuple[bytes, bool]]:
    """The paths in a directory, the last one first, and whether each is a directory; its files' ``links`` are noted."""
    content = []
    prefix = path and path + b"/"
    with _reported(path), os.scandir(b"/proc/self/fd/%d" % directories.enter(path)) as found:
        for entry in sorted(found, key=attrgetter("name"), reverse=True):
            below = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                content.append((below, True))
                continue
            if links is not None or not (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISSOCK(status.st_mode):
                    continue
                if links is not None and status.st_nlink > 1:
                    links.add(below, None, status, changed=True)
            content.append((below, False))
    return content


def _numbered(dir_fd: int) -> set[tuple[bytes, int]]:
    """The names in a directory with their inode numbers."""
    with os.scandir(b"/proc/self/fd/%d" % dir_fd) as found:
        return {(entry.name, entry.inode()) for entry in found}


def _inode(status: os.stat_result) -> _Inode:
    return status.st_dev, status.st_ino


def _joined(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def _order(change: Change) -> bytes:
    """Sorts depth first: no byte of a name comes before the separator."""
    return change.path.replace(b"/", b"\0")


def _status(dir_fd: int, name: bytes) -> os.stat_result | None:
    """The status of a name, None where there is none or it is a socket."""
    try:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return None if stat.S_ISSOCK(status.st_mode) else status


def _same_content(old: int, new: int, name: bytes, size: int) -> bool:
    """Whether two files of one size hold the same; what is a hole in both is not read."""
    with _opened(old, name) as one, _opened(new, name) as two:
        at = 0
        while at < size:
            if size > _CHUNK:
                at = min(_next_data(one, at, size), _next_data(two, at, size))
            left, right = os.pread(one, _CHUNK, at), os.pread(two, _CHUNK, at)
            common = min(len(left), len(right))
            if not common:
                return len(left) == len(right)
            if left[:common] != right[:common]:
                return False
            at += common
        return True


def _next_data(fd: int, at: int, size: int) -> int:
    """Where the next data at or after ``at`` begins; ``size`` where nothing but a hole follows."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise


@contextmanager
def _opened(dir_fd: int, name: bytes) -> Iterator[int]:
    fd = os.open(name, _READ, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _reported(path: bytes) -> Iterator[None]:
    """Turn what the kernel says in the body into an error that names the directory."""
    try:
        yield
    except OSError as error:
        raise refused(f"comparing the directory {os.fsdecode(b'/' + path)!r} with the parent's", error) from error
