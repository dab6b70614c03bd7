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

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Final, Self

from layerfs import xattrs
from layerfs.beneath import open_directory
from layerfs.driver import Change, ChangeKind
from layerfs.errors import FailedPrecondition, refused
from layerfs.record import RecordWriter
from layerfs.tar import header as types
from layerfs.tar.writer import SizeChanged, TarWriter, header

_WHITEOUT: Final = b".wh."
_ROOT_NAME: Final = b"./"
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_diff` wrote.

    Attributes:
        diff_id: SHA-256 of the archive, ``sha256:…``.
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

    Raises:
        FailedPrecondition: a file changed while it was read, or has a name that a layer archive cannot hold.
        OutOfSpace, EnvironmentUnfit, KernelRefused: as everywhere, naming the file.
        BrokenPipeError: the reader of ``out`` went away.
    """
    writer = None if record is None else RecordWriter(record)
    with TarWriter(out, writer) as tar, _Entries(new, tar, source_date_epoch, contents) as entries:
        for deleted, path in _in_order(changes):
            entries.add(path, deleted=deleted)
        digest, size = tar.finish()
    return Written(f"sha256:{digest}", size, entries.count)


def nowhere() -> BinaryIO:
    """An open file that forgets what is written to it: for a diff of which only the digest is wanted."""
    return open(os.devnull, "wb")


def _in_order(changes: Iterable[Change]) -> Iterator[tuple[bool, bytes]]:
    """Whether it was deleted, and the path, of every change: depth first, what was deleted first in its directory.

    They are sorted by path with NULs as separators, which no byte of a name comes before; one more NUL stands before
    the name of what was deleted. That form is all that is held in memory.
    """
    keys = [_key(change) for change in changes]
    keys.sort()
    for key in keys:
        above, _, name = key.rpartition(b"\0")
        if key.startswith(b"\0") or above.endswith(b"\0"):
            yield True, (above + name).replace(b"\0", b"/")
        else:
            yield False, key.replace(b"\0", b"/")


def _key(change: Change) -> bytes:
    key = change.path.replace(b"/", b"\0")
    if change.kind is not ChangeKind.DELETED:
        return key
    above, separator, name = key.rpartition(b"\0")
    return above + separator + b"\0" + name


class _Entries:
    """Writes the entries of paths that come in depth-first order."""

    def __init__(self, tree: int, tar: TarWriter, source_date_epoch: int | None, contents: bool) -> None:
        self._contents = contents
        self._tree = tree
        self._tar = tar
        self._latest = None if source_date_epoch is None else source_date_epoch * 1_000_000_000
        self._written: list[bytes] = [b""]
        """The directories on the way to the last entry, which have entries themselves."""
        self._links: dict[tuple[int, int], bytes] = {}
        self._directory: tuple[bytes, int] | None = None
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

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
                self._put(0, 0, 0, 0, {}, prefix + _WHITEOUT + name, types.REGULAR)
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
        dir_fd = self._enter(parent)
        status = os.stat(name or b".", dir_fd=dir_fd, follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFSOCK:
            return
        mtime = status.st_mtime_ns
        if self._latest is not None and mtime > self._latest:
            mtime = self._latest
        put = partial(self._put, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, mtime)
        if status.st_nlink > 1 and kind != stat.S_IFDIR:
            first = self._links.setdefault((status.st_dev, status.st_ino), path)
            if first is not path:
                put(_attributes(dir_fd, name), path, types.LINK, link=first)
                return
        if kind == stat.S_IFREG and status.st_size:
            self._put_file(put, path, dir_fd, name, status.st_size)
            return
        put = partial(put, _attributes(dir_fd, name))
        if kind == stat.S_IFDIR:
            if path:
                self._written.append(path)
            put(path + b"/" if path else _ROOT_NAME, types.DIRECTORY)
        elif kind == stat.S_IFREG:
            put(path, types.REGULAR)
        elif kind == stat.S_IFLNK:
            put(path, types.SYMLINK, link=os.readlink(name, dir_fd=dir_fd))
        elif kind == stat.S_IFIFO:
            put(path, types.FIFO)
        else:
            device = os.major(status.st_rdev), os.minor(status.st_rdev)
            put(path, types.CHAR if kind == stat.S_IFCHR else types.BLOCK_DEVICE, device=device)

    def _put_file(self, put: Callable[..., None], path: bytes, dir_fd: int, name: bytes, size: int) -> None:
        fd = os.open(name, _READ, dir_fd=dir_fd)
        try:
            put(xattrs.read(fd), path, types.REGULAR, size=size)
            if self._contents:
                self._tar.payload(fd, size, path)
        finally:
            os.close(fd)

    def _put(
        self,
        mode: int,
        uid: int,
        gid: int,
        mtime: int,
        attributes: Mapping[str, bytes],
        name: bytes,
        kind: bytes,
        *,
        size: int = 0,
        link: bytes = b"",
        device: tuple[int, int] = (0, 0),
    ) -> None:
        self._tar.header(header(name, kind, mode, uid, gid, mtime, size, link, device, attributes))
        self.count += 1

    def _enter(self, path: bytes) -> int:
        """A descriptor for the directory ``path``, which is kept for the next entry."""
        if self._directory is None or self._directory[0] != path:
            self._leave()
            self._directory = path, open_directory(self._tree, path)
        return self._directory[1]

    def _leave(self) -> None:
        if self._directory is not None:
            os.close(self._directory[1])
            self._directory = None


def _attributes(dir_fd: int, name: bytes) -> dict[str, bytes]:
    return xattrs.read(b"/proc/self/fd/%d/%b" % (dir_fd, name))


def _quoted(path: bytes) -> str:
    return repr(os.fsdecode(path) or "/")
