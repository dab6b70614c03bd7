"""What the kernel may ask for: each operation takes a request apart, has it carried out, and puts the answer together.

An operation returns its answer, or None where there is none. It raises `OSError` for its error number, `Pending` to be
repeated later, and `Aside` to be answered by a thread.

Where it may, the kernel reads and writes real files itself (FUSE's passthrough), and asks for all else as before. It
cannot change the real file of what is open, so it gets those that stay what they are: files of the upper, and all files
of a union that is read-only, where reading them changes no times. A lower file that may yet be copied up is read
through the daemon and the kernel's cache, so that who has it open sees what others write, as on the kernel's overlay. A
mapping may outlive what the kernel tells of: after it has forgotten a file that is still mapped, times change unseen
until it is asked for something else of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from collections.abc import Callable
from typing import Final

from layerfs.drivers.aufs.copyup import CopyUp
from layerfs.drivers.aufs.passthrough import SPECIAL_BITS, Passthrough
from layerfs.drivers.aufs.tree import Dir, Node, Tree
from layerfs.drivers.aufs.union import Caller, Union
from layerfs.kernel import fuse, xattr
from layerfs.kernel.libc import check, libc

WANTED: Final = (
    fuse.ASYNC_READ
    | fuse.ATOMIC_O_TRUNC
    | fuse.BIG_WRITES
    | fuse.DONT_MASK
    | fuse.DO_READDIRPLUS
    | fuse.ASYNC_DIO
    | fuse.WRITEBACK_CACHE
    | fuse.PARALLEL_DIROPS
    | fuse.POSIX_ACL
    | fuse.MAX_PAGES
    | fuse.CACHE_SYMLINKS
    | fuse.NO_OPENDIR_SUPPORT
    | fuse.EXPLICIT_INVAL_DATA
    | fuse.HANDLE_KILLPRIV_V2
)
"""What is agreed on with the kernel: nothing changes the branches but through it, so it may cache all there is."""

PASSTHROUGH: Final = WANTED | fuse.PASSTHROUGH
"""The same where it may read and write the branches' files itself: it caches then nothing that is to be written."""

Payload = bytes | list[bytes | memoryview]
"""An answer, in one piece or in several."""

_FOREVER: Final = 10**9
_NS: Final = 10**9
_COPY_AT_ONCE: Final = 16 << 20
_TIMES: Final = fuse.FATTR_ATIME | fuse.FATTR_MTIME | fuse.FATTR_CTIME | fuse.FATTR_FH
_NO_ENTRY: Final = fuse.ENTRY_OUT.pack(0, 0, _FOREVER, 0, 0, 0, *[0] * 16)
_ATTR_VALID: Final = slice(fuse.ENTRY_ATTR_VALID, fuse.ENTRY_ATTR_VALID + 8)
_DOTS: Final = ((1, b"."), (2, b".."))
_PLUS: Final = fuse.ENTRY_OUT.size + fuse.DIRENT.size


class Request:
    """What the kernel asks for, with ``data`` behind the header."""

    __slots__ = ("data", "gid", "node", "opcode", "uid", "unique")

    def __init__(self, opcode: int, unique: int, node: int, uid: int, gid: int, data: memoryview) -> None:
        self.opcode = opcode
        self.unique = unique
        self.node = node
        self.uid = uid
        self.gid = gid
        self.data = data

    @property
    def caller(self) -> Caller:
        return Caller(self.uid, self.gid)

    def strings(self, offset: int) -> list[bytes]:
        """The NUL-terminated strings from ``offset`` on."""
        return bytes(self.data[offset:]).split(b"\0")[:-1]

    def name(self, offset: int = 0) -> bytes:
        """The one NUL-terminated string that follows ``offset``."""
        return bytes(self.data[offset:-1])


class Aside(Exception):
    """The request is answered with what ``work`` returns, which may take long and is called in a thread."""

    def __init__(self, work: Callable[[], Payload]) -> None:
        super().__init__()
        self.work = work


class Operations:
    """The operations on one union.

    Args:
        device: /dev/fuse, to tell the kernel what to write back, and which files to read and write itself.
        work: see `CopyUp`.
        passthrough: `fuse.PASSTHROUGH` has been granted.

    Attributes:
        handlers: what carries out each operation, by its number.
    """

    def __init__(self, device: int, tree: Tree, work: int | None, *, passthrough: bool) -> None:
        self._device = device
        self._tree = tree
        self._nodes = tree.nodes
        self._copyup = CopyUp(tree, work)
        self._union = Union(tree, self._copyup)
        self._passthrough = Passthrough(device, granted=passthrough, read_only=work is None)
        self._open: dict[int, Node] = {}
        self._written: set[int] = set()
        self._block = memoryview(bytearray(fuse.MAX_WRITE))
        self._can_peek = True
        self.handlers: dict[int, Callable[[Request], Payload | None]] = {
            fuse.LOOKUP: self._lookup,
            fuse.FORGET: self._forget,
            fuse.GETATTR: self._getattr,
            fuse.SETATTR: self._setattr,
            fuse.READLINK: self._readlink,
            fuse.SYMLINK: self._symlink,
            fuse.MKNOD: self._mknod,
            fuse.MKDIR: self._mkdir,
            fuse.UNLINK: self._unlink,
            fuse.RMDIR: self._rmdir,
            fuse.RENAME: self._rename,
            fuse.RENAME2: self._rename2,
            fuse.LINK: self._link,
            fuse.OPEN: self._open_file,
            fuse.READ: self._read,
            fuse.WRITE: self._write,
            fuse.STATFS: self._statfs,
            fuse.RELEASE: self._release,
            fuse.FSYNC: self._fsync,
            fuse.FSYNCDIR: self._fsyncdir,
            fuse.SETXATTR: self._setxattr,
            fuse.GETXATTR: self._getxattr,
            fuse.LISTXATTR: self._listxattr,
            fuse.REMOVEXATTR: self._removexattr,
            fuse.CREATE: self._create,
            fuse.TMPFILE: self._tmpfile,
            fuse.BATCH_FORGET: self._batch_forget,
            fuse.READDIRPLUS: self._readdirplus,
            fuse.FALLOCATE: self._fallocate,
            fuse.LSEEK: self._lseek,
            fuse.COPY_FILE_RANGE: self._copy_file_range,
        }

    # Names and attributes

    def _node(self, number: int) -> Node:
        try:
            return self._nodes[number]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    def _directory(self, number: int) -> Dir:
        node = self._nodes.get(number)
        if type(node) is Dir:
            return node
        self._node(number)
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def _entry(self, node: Node, info: os.stat_result) -> bytes:
        """A node that the kernel learns of."""
        node.lookups += 1
        mode, _, _, links, uid, gid, size, atime, mtime, ctime = info
        # What the kernel writes itself changes times when it is mapped, and takes special bits away.
        valid = 0 if node.mappable or (node.backing and mode & SPECIAL_BITS) else _FOREVER
        return fuse.ENTRY_OUT.pack(
            *(node.ino, 0, _FOREVER, valid, 0, 0, node.ino, size, info.st_blocks, atime, mtime, ctime),
            info.st_atime_ns - atime * _NS,
            info.st_mtime_ns - mtime * _NS,
            info.st_ctime_ns - ctime * _NS,
            mode,
            self._tree.links(node, info) if node.unlinked or node.kind == stat.S_IFDIR else links,
            uid,
            gid,
            info.st_rdev and _device_number(info.st_rdev),
            info.st_blksize,
            0,
        )

    def _lookup(self, request: Request) -> bytes:
        found = self._tree.find(self._directory(request.node), bytes(request.data[:-1]))
        return _NO_ENTRY if found is None else self._entry(*found)

    def _forget(self, request: Request) -> None:
        self._tree.forget(request.node, *fuse.FORGET_IN.unpack_from(request.data))

    def _batch_forget(self, request: Request) -> None:
        (count,) = fuse.BATCH_FORGET_IN.unpack_from(request.data)
        start = fuse.BATCH_FORGET_IN.size
        for at in range(start, start + count * fuse.FORGET_ONE.size, fuse.FORGET_ONE.size):
            self._tree.forget(*fuse.FORGET_ONE.unpack_from(request.data, at))

    def _getattr(self, request: Request) -> bytes:
        node = self._node(request.node)
        return self._attributes(node, self._tree.status(node))

    def _attributes(self, node: Node, info: os.stat_result) -> bytes:
        """What is said of a node that the kernel knows: the same, but for how it is called."""
        entry = self._entry(node, info)
        node.lookups -= 1
        return entry[_ATTR_VALID] + bytes(8) + entry[fuse.ENTRY_HEAD :]

    def _setattr(self, request: Request) -> bytes:
        node = self._node(request.node)
        valid, _, size, atime, mtime, _, atime_ns, mtime_ns, _, mode, uid, gid = fuse.SETATTR_IN.unpack_from(
            request.data
        )
        if not valid & ~_TIMES:
            # The kernel writes back times when it forgets a file, also of one that is gone, or that has not changed.
            info = self._tree.status(node)
            times = atime * _NS + atime_ns, mtime * _NS + mtime_ns
            same = not valid & fuse.FATTR_ATIME or times[0] == info.st_atime_ns
            gone = self._tree.is_gone(node) and not node.fds
            if gone or (same and node.lower and times[1] == info.st_mtime_ns):
                return self._attributes(node, info)
        self._copyup.node(node, contents=not (valid & fuse.FATTR_SIZE and size == 0))
        path = self._path(node)
        follow = node.orphan >= 0
        if valid & (fuse.FATTR_UID | fuse.FATTR_GID):
            owner = uid if valid & fuse.FATTR_UID else -1
            group = gid if valid & fuse.FATTR_GID else -1
            os.chown(path, owner, group, follow_symlinks=follow)
        if valid & fuse.FATTR_MODE:
            if node.kind == stat.S_IFLNK:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            os.chmod(path, mode & 0o7777)
        if valid & fuse.FATTR_SIZE:
            if valid & fuse.FATTR_KILL_SUIDGID:
                self._kill_special_bits(path)
            os.truncate(path, size)
        if valid & (fuse.FATTR_ATIME | fuse.FATTR_MTIME):
            old = self._tree.status(node)
            now = time.time_ns()
            accessed, modified = old.st_atime_ns, old.st_mtime_ns
            if valid & fuse.FATTR_ATIME:
                accessed = now if valid & fuse.FATTR_ATIME_NOW else atime * _NS + atime_ns
            if valid & fuse.FATTR_MTIME:
                modified = now if valid & fuse.FATTR_MTIME_NOW else mtime * _NS + mtime_ns
            os.utime(path, ns=(accessed, modified), follow_symlinks=follow)
        return self._attributes(node, self._tree.status(node))

    def _path(self, node: Node) -> bytes:
        return self._tree.path(node)

    def _kill_special_bits(self, path: bytes) -> None:
        mode = os.stat(path).st_mode
        kept = mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            kept &= ~stat.S_ISGID
        if kept != mode:
            os.chmod(path, stat.S_IMODE(kept))

    def _readlink(self, request: Request) -> bytes:
        node = self._node(request.node)
        if node.orphan >= 0:
            return os.readlink(b"", dir_fd=node.orphan)
        return os.readlink(node.named, dir_fd=self._tree.place_fd(node))

    # Making and removing names

    def _mknod(self, request: Request) -> bytes:
        mode, device, umask = fuse.MKNOD_IN.unpack_from(request.data)
        name = request.name(fuse.MKNOD_IN.size)
        device = os.makedev((device >> 8) & 0xFFF, device & 0xFF | (device >> 12) & 0xFFF00)
        return self._entry(*self._union.mknod(self._directory(request.node), name, mode, device, umask, request.caller))

    def _mkdir(self, request: Request) -> bytes:
        mode, umask = fuse.MKDIR_IN.unpack_from(request.data)
        name = request.name(fuse.MKDIR_IN.size)
        return self._entry(*self._union.mkdir(self._directory(request.node), name, mode, umask, request.caller))

    def _symlink(self, request: Request) -> bytes:
        name, target = request.strings(0)
        return self._entry(*self._union.symlink(self._directory(request.node), name, target, request.caller))

    def _link(self, request: Request) -> bytes:
        node = self._node(*fuse.LINK_IN.unpack_from(request.data))
        info = self._union.link(node, self._directory(request.node), request.name(fuse.LINK_IN.size))
        return self._entry(node, info)

    def _unlink(self, request: Request) -> bytes:
        self._union.unlink(self._directory(request.node), request.name())
        return b""

    def _rmdir(self, request: Request) -> bytes:
        self._union.rmdir(self._directory(request.node), request.name())
        return b""

    def _rename(self, request: Request) -> bytes:
        (new,) = fuse.RENAME_IN.unpack_from(request.data)
        return self._do_rename(request, new, 0, request.strings(fuse.RENAME_IN.size))

    def _rename2(self, request: Request) -> bytes:
        new, flags = fuse.RENAME2_IN.unpack_from(request.data)
        return self._do_rename(request, new, flags, request.strings(fuse.RENAME2_IN.size))

    def _do_rename(self, request: Request, new: int, flags: int, names: list[bytes]) -> bytes:
        self._union.rename(self._directory(request.node), names[0], self._directory(new), names[1], flags)
        return b""

    def _readdirplus(self, request: Request) -> Payload:
        directory = self._directory(request.node)
        _, offset, room = fuse.READ_IN.unpack_from(request.data)
        tree = self._tree
        parts: list[bytes | memoryview] = []
        tree.load(directory)
        if offset < len(_DOTS):
            for cookie, name in _DOTS[offset:]:
                dot = _NO_ENTRY + fuse.DIRENT.pack(directory.ino, cookie, len(name), stat.S_IFDIR >> 12)
                parts.append(dot + name.ljust(8, b"\0"))
                room -= len(dot) + 8
        for cookie, name in directory.listing(offset):
            padded = len(name) + 7 & ~7
            room -= _PLUS + padded
            if room < 0:
                break
            found = tree.find(directory, name)
            if found is None:
                continue
            node, info = found
            parts.append(
                self._entry(node, info)
                + fuse.DIRENT.pack(node.ino, cookie, len(name), node.kind >> 12)
                + name.ljust(padded, b"\0")
            )
        return b"".join(parts)

    # Files

    def _open_file(self, request: Request) -> bytes:
        flags, open_flags = fuse.OPEN_IN.unpack_from(request.data)
        node = self._node(request.node)
        writing = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if writing:
            self._copyup.node(node, contents=not flags & os.O_TRUNC)
            if open_flags & fuse.OPEN_KILL_SUIDGID:
                self._kill_special_bits(self._path(node))
        return self._opened(node, self._descriptor(node, flags, writing), flags)

    def _descriptor(self, node: Node, flags: int, writing: bool) -> int:
        """Open the real file. For its write-back cache the kernel reads what it is to write, and appends by itself."""
        flags &= ~(os.O_ACCMODE | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_NONBLOCK | os.O_NOCTTY)
        flags |= os.O_CLOEXEC
        mode = os.O_RDWR if writing else os.O_RDONLY
        if node.orphan >= 0:
            return os.open(self._path(node), (flags & ~os.O_NOFOLLOW) | mode)
        place = self._tree.place_fd(node)
        if not writing and os.geteuid() == 0:
            flags |= os.O_NOATIME
        try:
            return os.open(node.named, flags | mode | os.O_NOFOLLOW, dir_fd=place)
        except PermissionError:
            if not writing:
                return os.open(node.named, flags & ~os.O_NOATIME | mode | os.O_NOFOLLOW, dir_fd=place)
            return os.open(node.named, flags | os.O_WRONLY | os.O_NOFOLLOW, dir_fd=place)

    def _opened(self, node: Node, fd: int, flags: int) -> bytes:
        known = bool(node.lookups)
        try:
            passed = self._passthrough.begin(node, fd, flags)
        except BaseException:
            os.close(fd)
            self._passthrough.end(node)
            self._tree.discard_unknown(node)
            raise
        others = bool(node.fds)
        node.fds.append(fd)
        self._open[fd] = node
        if passed:
            if flags & os.O_ACCMODE == os.O_RDWR and not node.mappable:
                node.mappable = True
                if known:
                    with contextlib.suppress(FileNotFoundError):  # the kernel has nothing of it
                        os.write(self._device, fuse.inval_attributes(node.ino))
            return fuse.OPEN_OUT.pack(fd, fuse.FOPEN_PASSTHROUGH, node.backing)
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            self._written.add(fd)
        # What is cached of a file in the upper may be from before the kernel wrote that itself.
        keep = node.lower or others or not self._passthrough.granted
        return fuse.OPEN_OUT.pack(fd, fuse.FOPEN_KEEP_CACHE if keep else 0, 0)

    def _create(self, request: Request) -> bytes:
        flags, mode, umask, _ = fuse.CREATE_IN.unpack_from(request.data)
        name = request.name(fuse.CREATE_IN.size)
        directory = self._directory(request.node)
        self._tree.load(directory)
        if directory.has(name) and not flags & os.O_EXCL:  # it was made meanwhile
            node = self._tree.get(directory, name)
            self._copyup.node(node, contents=not flags & os.O_TRUNC)
            fd, info = self._descriptor(node, flags, True), self._tree.status(node)
        else:
            node, info, fd = self._union.create(directory, name, flags, mode, umask, request.caller)
        opened = self._opened(node, fd, flags)
        return self._entry(node, info) + opened

    def _tmpfile(self, request: Request) -> bytes:
        flags, mode, umask, _ = fuse.CREATE_IN.unpack_from(request.data)
        directory = self._directory(request.node)
        node, info, fd = self._union.unnamed(directory, flags, mode, umask, request.caller)
        opened = self._opened(node, fd, flags)
        return self._entry(node, info) + opened

    def _release(self, request: Request) -> bytes:
        (fd,) = fuse.RELEASE_IN.unpack_from(request.data)
        node = self._open.pop(fd)
        node.fds.remove(fd)
        self._written.discard(fd)
        os.close(fd)
        self._passthrough.end(node)
        self._tree.discard_unknown(node)
        return b""

    def _read(self, request: Request) -> Payload:
        fd, offset, size = fuse.READ_IN.unpack_from(request.data)
        block = self._block[:size]
        if self._can_peek:
            try:
                length = os.preadv(fd, (block,), offset, os.RWF_NOWAIT)
                if length == size:
                    return [block]
            except BlockingIOError:
                length = 0
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._can_peek = False
            if self._can_peek:
                if not length or offset + length < os.fstat(fd).st_size:
                    copy = os.dup(fd)
                    raise Aside(lambda: _read_whole(copy, offset, size))
                return [block[:length]]
        return [block[: os.preadv(fd, (block,), offset)]]

    def _write(self, request: Request) -> bytes:
        fd, offset, size, flags = fuse.WRITE_IN.unpack_from(request.data)
        start = fuse.WRITE_IN.size
        data = request.data[start : start + size]
        if flags & fuse.WRITE_KILL_SUIDGID:
            self._kill_special_bits(b"/proc/self/fd/%d" % fd)
        done = os.pwrite(fd, data, offset)
        while done < size:
            written = os.pwrite(fd, data[done:], offset + done)
            if not written:
                break
            done += written
        return fuse.WRITE_OUT.pack(done)

    def _fsync(self, request: Request) -> bytes:
        fd, flags = fuse.FSYNC_IN.unpack_from(request.data)
        copy = os.dup(fd)
        raise Aside(lambda: _sync(copy, data_only=bool(flags & fuse.FSYNC_FDATASYNC)))

    def _fsyncdir(self, request: Request) -> bytes:
        directory = self._directory(request.node)
        if directory.upper is None:
            return b""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._copyup.upper(directory))
        raise Aside(lambda: _sync(fd, data_only=False))

    def _fallocate(self, request: Request) -> bytes:
        fd, offset, length, mode = fuse.FALLOCATE_IN.unpack_from(request.data)
        check(libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))
        return b""

    def _lseek(self, request: Request) -> bytes:
        """Look for data or a hole. What is being written may still be in the kernel's cache, and has to come first."""
        fd, offset, whence = fuse.LSEEK_IN.unpack_from(request.data)
        node = self._open[fd]
        if self._written.isdisjoint(node.fds):
            return fuse.LSEEK_OUT.pack(os.lseek(fd, offset, whence))
        copy = os.dup(fd)

        def seek() -> bytes:
            try:
                with contextlib.suppress(FileNotFoundError):  # the kernel has nothing of it any more
                    os.write(self._device, fuse.inval_inode(node.ino))
                return fuse.LSEEK_OUT.pack(os.lseek(copy, offset, whence))
            finally:
                os.close(copy)

        raise Aside(seek)

    def _copy_file_range(self, request: Request) -> bytes:
        source, offset, _, target, at, length, _ = fuse.COPY_FILE_RANGE_IN.unpack_from(request.data)
        return fuse.WRITE_OUT.pack(os.copy_file_range(source, target, min(length, _COPY_AT_ONCE), offset, at))

    def _statfs(self, request: Request) -> bytes:  # noqa: ARG002
        info = os.statvfs(self._tree.root.at.fd)
        return fuse.STATFS_OUT.pack(
            info.f_blocks,
            info.f_bfree,
            info.f_bavail,
            info.f_files,
            info.f_ffree,
            info.f_bsize,
            info.f_namemax,
            info.f_frsize,
        )

    # Extended attributes

    def _setxattr(self, request: Request) -> bytes:
        size, flags = fuse.SETXATTR_IN.unpack_from(request.data)
        name = bytes(request.data[fuse.SETXATTR_IN.size :]).partition(b"\0")[0]
        start = fuse.SETXATTR_IN.size + len(name) + 1
        node = self._node(request.node)
        self._copyup.node(node)
        value = bytes(request.data[start : start + size])
        os.setxattr(self._path(node), name, value, flags, follow_symlinks=node.orphan >= 0)
        return b""

    def _getxattr(self, request: Request) -> bytes:
        (size,) = fuse.GETXATTR_IN.unpack_from(request.data)
        node = self._node(request.node)
        name = request.name(fuse.GETXATTR_IN.size)
        return _sized(xattr.get(self._path(node), name, follow_symlinks=node.orphan >= 0), size)

    def _listxattr(self, request: Request) -> bytes:
        (size,) = fuse.GETXATTR_IN.unpack_from(request.data)
        node = self._node(request.node)
        names = os.listxattr(self._path(node), follow_symlinks=node.orphan >= 0)
        if request.uid:
            names = [name for name in names if not name.startswith("trusted.")]
        return _sized(b"".join(os.fsencode(name) + b"\0" for name in names), size)

    def _removexattr(self, request: Request) -> bytes:
        node = self._node(request.node)
        self._copyup.node(node)
        os.removexattr(self._path(node), request.name(), follow_symlinks=node.orphan >= 0)
        return b""


def _sized(value: bytes, room: int) -> bytes:
    """The answer to who asks for a value, or with no room for it for its size."""
    if not room:
        return fuse.GETXATTR_OUT.pack(len(value))
    if len(value) > room:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return value


def _device_number(device: int) -> int:
    """A device number as the kernel's ``new_encode_dev`` has it, in 32 bits."""
    if not device:
        return 0
    major, minor = os.major(device), os.minor(device)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def _read_whole(fd: int, offset: int, size: int) -> Payload:
    """Read from a descriptor, which is closed then, as much as there is up to ``size``."""
    try:
        parts: list[bytes | memoryview] = []
        while size and (part := os.pread(fd, size, offset)):
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts or [b""]
    finally:
        os.close(fd)


def _sync(fd: int, *, data_only: bool) -> bytes:
    """Sync a descriptor and close it."""
    try:
        os.fdatasync(fd) if data_only else os.fsync(fd)
    finally:
        os.close(fd)
    return b""
