"""A directory seen through pyfuse3 and trio: what FUSE in Python takes by itself, without any union's logic.

``python -m layerfs.bench.peers.passthrough SOURCE TARGET`` serves SOURCE at TARGET until that is unmounted. It has what
the comparison of unions asks for (files and directories) and no more; all that the kernel may cache, it may.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

_TIMEOUT: Final = 3600
"""Seconds for which the kernel may believe names and attributes: nobody changes the directory behind its back."""
_STATUS: Final = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blksize", "st_blocks")
_TIMES: Final = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")
_SPACE: Final = (
    "f_bsize",
    "f_frsize",
    "f_blocks",
    "f_bfree",
    "f_bavail",
    "f_files",
    "f_ffree",
    "f_favail",
    "f_namemax",
)


class Passthrough(pyfuse3.Operations):
    """Answers each request with the system call of the same name."""

    enable_writeback_cache = True

    def __init__(self, source: bytes) -> None:
        super().__init__()
        self._paths: dict[int, bytes] = {pyfuse3.ROOT_INODE: source}

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:  # noqa: ARG002
        return self._entry(self._paths[parent_inode] + b"/" + name)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:  # noqa: ARG002
        return self._attributes(self._paths[inode], inode)

    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,  # noqa: ARG002
        ctx: RequestContext,  # noqa: ARG002
    ) -> EntryAttributes:
        path = self._paths[inode]
        with _errors():
            if fields.update_size:
                os.truncate(path, attr.st_size)
            if fields.update_mode:
                os.chmod(path, attr.st_mode & 0o7777)
            if fields.update_mtime:
                os.utime(path, ns=(os.stat(path).st_atime_ns, attr.st_mtime_ns))
        return self._attributes(path, inode)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:  # noqa: ARG002
        with _errors():
            # The kernel reads what it fills its pages with, and puts what is appended at the end, by itself.
            access = os.O_RDWR if flags & os.O_ACCMODE == os.O_WRONLY else flags & os.O_ACCMODE
            return FileInfo(fh=os.open(self._paths[inode], access | os.O_CLOEXEC), keep_cache=True)

    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: RequestContext,  # noqa: ARG002
    ) -> tuple[FileInfo, EntryAttributes]:
        path = self._paths[parent_inode] + b"/" + name
        with _errors():
            fd = os.open(path, (flags & ~os.O_ACCMODE) | os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        return FileInfo(fh=fd, keep_cache=True), self._entry(path)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        with _errors():
            return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        with _errors():
            return os.pwrite(fh, buf, off)

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:  # noqa: ARG002
        with _errors():
            os.unlink(self._paths[parent_inode] + b"/" + name)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, _ in inode_list:
            self._paths.pop(inode, None)

    async def opendir(self, inode: int, ctx: RequestContext) -> int:  # noqa: ARG002
        return inode

    async def releasedir(self, fh: int) -> None:
        pass

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        path = self._paths[fh]
        with _errors():
            names = sorted(os.listdir(path))
        for number, name in enumerate(names[start_id:], start_id + 1):
            entry = self._entry(path + b"/" + name)
            if not pyfuse3.readdir_reply(token, name, entry, number):
                return

    async def statfs(self, ctx: RequestContext) -> StatvfsData:  # noqa: ARG002
        space, found = os.statvfs(self._paths[pyfuse3.ROOT_INODE]), StatvfsData()
        for field in _SPACE:
            setattr(found, field, getattr(space, field))
        return found

    def _entry(self, path: bytes) -> EntryAttributes:
        """The attributes of what is at a path, by which the kernel will name it from now on."""
        entry = self._attributes(path, None)
        self._paths[entry.st_ino] = path
        return entry

    def _attributes(self, path: bytes, inode: int | None) -> EntryAttributes:
        with _errors():
            status = os.lstat(path)
        entry = EntryAttributes()
        for field in (*_STATUS, *_TIMES):
            setattr(entry, field, getattr(status, field))
        entry.st_ino = status.st_ino if inode is None else inode
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = _TIMEOUT
        return entry


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FUSEError(error.errno or errno.EIO) from error


def main(source: str, target: str) -> None:
    """Serve until the mount is gone."""
    pyfuse3.init(Passthrough(os.fsencode(source)), target, {*pyfuse3.default_options, "fsname=passthrough"})
    try:
        with suppress(KeyboardInterrupt):
            trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
