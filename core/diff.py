"""A layer's changes as an OCI layer tar whose bytes depend on the two trees alone.

Decided here, where the OCI image spec leaves freedom:

- Every changed path stands after the entries of all its parent directories, each once; the root has an entry (``./``)
  only where it changed itself. Entries are in the order of `layerfs.changes`, whiteouts first in their directory.
- Never an opaque marker: each deleted path has its own whiteout, with mode, owner and time 0.
- Owners are numbers without names. Times are in nanoseconds. Attributes are those that `layerfs.xattrs` keeps.
- The first name of an inode has its content, the others are hard links to it. Their headers repeat mode, owner, time
  and attributes, because engines set those again for each entry.
- Sockets are left out; holes are written as zeros.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, Self

from layerfs import xattrs
from layerfs.beneath import Directories
from layerfs.driver import Change, ChangeKind
from layerfs.errors import FailedPrecondition, refused
from layerfs.record import RecordWriter
from layerfs.tar import header as types
from layerfs.tar.writer import SizeChanged, TarWriter, header

_WHITEOUT: Final = b".wh."
_ROOT_NAME: Final = b"./"
_DELETED: Final = ChangeKind.DELETED
_WHOLE: Final = Change(ChangeKind.ADDED, b"")
_TYPE: Final = stat.S_IFMT(-1 & 0xFFFF)
_PERMISSIONS: Final = stat.S_IMODE(-1 & 0xFFFF)
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_diff` wrote.

    Attributes:
        diff_id: SHA-256 of the archive, ``sha256:…``; empty where it was not wanted.
        size: bytes of the archive.
        entries: entries in it, whiteouts among them.
    """

    diff_id: str
    size: int
    entries: int


def write_diff(
    changes: Iterable[Change],
    new: int,
    out: BinaryIO,
    *,
    source_date_epoch: int | None = None,
    record: BinaryIO | None = None,
    contents: bool = True,
    digest: bool = True,
) -> Written:
    """Write ``changes``, whose new side is the tree ``new``, to ``out`` as an uncompressed archive.

    Args:
        new: directory descriptor of a tree that nobody writes to in the meantime.
        out: must be done with what its ``write`` is given when it returns.
        source_date_epoch: seconds since the epoch; later modification times are written as this one
            (https://reproducible-builds.org/specs/source-date-epoch/).
        record: takes the tar record (see `layerfs.record`).
        contents: without, only the headers are written. That is no archive, but its digest is one of all that a diff
            says of files beside their contents, at the price of a walk.
        digest: without, and without ``record``, `Written.diff_id` is empty, and it takes less time.

    Raises:
        FailedPrecondition: a file changed while it was read, or has a name that a layer archive cannot hold.
        OutOfSpace, EnvironmentUnfit, KernelRefused: as everywhere, naming the file.
        BrokenPipeError: the reader of ``out`` went away.
    """
    writer = None if record is None else RecordWriter(record)
    with (
        TarWriter(out, writer, digest=digest or writer is not None) as tar,
        _Entries(new, tar, source_date_epoch, contents) as entries,
    ):
        for deleted, path in _in_order(changes):
            entries.add(path, deleted=deleted)
        sha256, size = tar.finish()
    return Written(f"sha256:{sha256}" if sha256 else "", size, entries.count)


def nowhere() -> BinaryIO:
    """An open file that forgets what is written to it: for a diff of which only the digest is wanted."""
    return open(os.devnull, "wb")


def _in_order(changes: Iterable[Change]) -> Iterator[tuple[bool, bytes]]:
    """Whether it was deleted, and the path, of every change: depth first, what was deleted first in its directory.

    They are sorted by path with NULs as separators, which no byte of a name comes before; one more NUL stands before
    the name of what was deleted. That form is all that is held in memory, and nothing of a tree without a parent.
    """
    todo = iter(changes)
    first = next(todo, None)
    if first is None:
        return
    if first == _WHOLE:  # in which nothing was deleted, so that it has its order already
        yield False, b""
        for _, path in todo:
            yield False, path
        return
    changes = itertools.chain([first], todo)
    keys = [_deleted(path) if kind is _DELETED else path.replace(b"/", b"\0") for kind, path in changes]
    keys.sort()
    for key in keys:
        above, _, name = key.rpartition(b"\0")
        if key.startswith(b"\0") or above.endswith(b"\0"):
            yield True, (above + name).replace(b"\0", b"/")
        else:
            yield False, key.replace(b"\0", b"/")


def _deleted(path: bytes) -> bytes:
    above, separator, name = path.replace(b"/", b"\0").rpartition(b"\0")
    return above + separator + b"\0" + name


class _Entries:
    """Writes the entries of paths that come in depth-first order."""

    def __init__(self, tree: int, tar: TarWriter, source_date_epoch: int | None, contents: bool) -> None:
        self._contents = contents
        self._directories = Directories(tree)
        self._tar = tar
        self._latest = None if source_date_epoch is None else source_date_epoch * 1_000_000_000
        self._written: list[bytes] = [b""]
        """The directories on the way to the last entry, which have entries themselves."""
        self._links: dict[tuple[int, int], bytes] = {}
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._directories.close()

    def add(self, path: bytes, *, deleted: bool) -> None:
        parent, _, name = path.rpartition(b"/")
        if name.startswith(_WHITEOUT):
            what = f"{_quoted(path)} cannot be in a layer archive, where names that begin with '.wh.' mean deletions"
            raise FailedPrecondition(f"{what}; rename it" if not deleted else what)
        if parent != self._written[-1]:
            self._add_parents(parent)
        try:
            if deleted:
                prefix = parent and parent + b"/"
                self._put(header(prefix + _WHITEOUT + name, types.REGULAR, 0, 0, 0, 0, {}))
            else:
                self._add(path, parent, name)
        except SizeChanged:
            reason = f"{_quoted(path)} changed its size while it was read"
            raise FailedPrecondition(f"{reason}; take the diff when nothing writes to the layer") from None
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise refused(f"writing {_quoted(path)} to the diff", error) from error

    def _add_parents(self, path: bytes) -> None:
        """Write the entries of those directories on the way to and with ``path`` that have none yet."""
        written = self._written
        while written[-1] and not (path + b"/").startswith(written[-1] + b"/"):
            written.pop()
        while written[-1] != path:
            above = written[-1]
            end = path.find(b"/", len(above) + 1 if above else 0)
            self.add(path if end < 0 else path[:end], deleted=False)

    def _add(self, path: bytes, parent: bytes, name: bytes) -> None:
        dir_fd = self._directories.enter(parent)
        status = os.stat(name or b".", dir_fd=dir_fd, follow_symlinks=False)
        mode = status.st_mode
        kind = mode & _TYPE
        if kind == stat.S_IFSOCK:
            return
        mtime = status.st_mtime_ns
        if self._latest is not None and mtime > self._latest:
            mtime = self._latest
        common = mode & _PERMISSIONS, status.st_uid, status.st_gid, mtime
        if status.st_nlink > 1 and kind != stat.S_IFDIR:
            first = self._links.setdefault((status.st_dev, status.st_ino), path)
            if first is not path:
                self._put(header(path, types.LINK, *common, _attributes(dir_fd, name), link=first))
                return
        if kind == stat.S_IFREG and status.st_size:
            fd = os.open(name, _READ, dir_fd=dir_fd)
            try:
                self._put(header(path, types.REGULAR, *common, xattrs.read(fd), size=status.st_size))
                if self._contents:
                    self._tar.payload(fd, status.st_size, path)
            finally:
                os.close(fd)
            return
        own = (*common, _attributes(dir_fd, name))
        if kind == stat.S_IFDIR:
            if path:
                self._written.append(path)
            self._put(header(path + b"/" if path else _ROOT_NAME, types.DIRECTORY, *own))
        elif kind == stat.S_IFREG:
            self._put(header(path, types.REGULAR, *own))
        elif kind == stat.S_IFLNK:
            self._put(header(path, types.SYMLINK, *own, link=os.readlink(name, dir_fd=dir_fd)))
        elif kind == stat.S_IFIFO:
            self._put(header(path, types.FIFO, *own))
        else:
            device = os.major(status.st_rdev), os.minor(status.st_rdev)
            self._put(header(path, types.CHAR if kind == stat.S_IFCHR else types.BLOCK_DEVICE, *own, device=device))

    def _put(self, head: bytes) -> None:
        self._tar.header(head)
        self.count += 1


def _attributes(dir_fd: int, name: bytes) -> dict[str, bytes]:
    return xattrs.read(b"/proc/self/fd/%d/%b" % (dir_fd, name))


def _quoted(path: bytes) -> str:
    return repr(os.fsdecode(path) or "/")
