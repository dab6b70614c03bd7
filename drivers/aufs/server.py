"""The daemon's loop: reads the kernel's requests, has them carried out, and answers.

One thread reads and answers; what may take long, which is reading from a disk, syncing and copying up large files, is
done by others. After an answer the next request often follows within microseconds, so the loop looks for it for a
moment before it sleeps, as long as that has paid lately: waking up costs more than most requests do.

No error ends the loop but that the mount is gone: what goes wrong in one operation is its answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import sys
import time
from collections.abc import Callable
from typing import Final

from layerfs.drivers.aufs.copyup import CopyUp
from layerfs.drivers.aufs.jobs import Job, Pending, Workers
from layerfs.drivers.aufs.tree import Dir, Node, Tree
from layerfs.drivers.aufs.union import Caller, Union
from layerfs.kernel import fuse
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

_FOREVER: Final = 10**9
_NS: Final = 10**9
_SPIN: Final = 60e-6
"""Seconds to look for the next request before sleeping."""
_COPY_AT_ONCE: Final = 16 << 20
_TIMES: Final = fuse.FATTR_ATIME | fuse.FATTR_MTIME | fuse.FATTR_CTIME | fuse.FATTR_FH
_HEADER: Final = fuse.IN_HEADER.size
_NO_ENTRY: Final = fuse.ENTRY_OUT.pack(0, 0, _FOREVER, 0, 0, 0, *[0] * 16)
_DOTS: Final = ((1, b"."), (2, b".."))


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


class NoReply(Exception):
    """The request is answered elsewhere, or by nothing."""


class Server:
    """Serves one union over the descriptor ``device`` of /dev/fuse."""

    def __init__(self, device: int, tree: Tree, work: int | None) -> None:
        self._device = device
        self._tree = tree
        self._nodes = tree.nodes
        self._copyup = CopyUp(tree, work)
        self._union = Union(tree, self._copyup)
        self._workers = Workers()
        self._parked: dict[Job, list[Request]] = {}
        self._open: dict[int, Node] = {}
        self._written: set[int] = set()
        self._buffer = bytearray(fuse.BUFFER_SIZE)
        self._block = memoryview(bytearray(fuse.MAX_WRITE))
        self._can_peek = True
        self._handlers: dict[int, Callable[[Request], bytes | list[bytes | memoryview]]] = {
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
            fuse.INTERRUPT: self._interrupt,
            fuse.BATCH_FORGET: self._batch_forget,
            fuse.READDIRPLUS: self._readdirplus,
            fuse.FALLOCATE: self._fallocate,
            fuse.LSEEK: self._lseek,
            fuse.COPY_FILE_RANGE: self._copy_file_range,
        }

    # The loop

    def run(self) -> None:
        """Serve until the mount is gone."""
        device, buffer = self._device, self._buffer
        view = memoryview(buffer)
        unpack = fuse.IN_HEADER.unpack_from
        wait = self._waiting()
        while True:
            try:
                length = os.readv(device, (buffer,))
            except BlockingIOError:
                length = 0
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno not in (errno.EINTR, errno.ENOENT):  # ENOENT: its caller gave up meanwhile
                    raise
                continue
            if length:
                _, opcode, unique, node, uid, gid, _ = unpack(buffer)
                self._tree.places.relax()
                self._serve(Request(opcode, unique, node, uid, gid, view[_HEADER:length]))
            elif wait():
                self._finish_jobs()

    def _waiting(self) -> Callable[[], bool]:
        """A function that waits for a request or a job that is done, and tells whether there is one of these."""
        ready = self._workers.ready
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        poll.register(ready, select.POLLIN)
        clock = time.perf_counter
        spin = _SPIN if len(os.sched_getaffinity(0)) > 1 else 0.0
        paid = True

        def wait() -> bool:
            nonlocal paid
            began = now = clock()
            events: list[tuple[int, int]] = []
            while paid and not events and now - began < spin:
                events = poll.poll(0)
                now = clock()
            events = events or poll.poll()
            paid = clock() - began < spin
            return any(fd == ready for fd, _ in events)

        return wait

    def _serve(self, request: Request) -> None:
        """Carry out a request and answer it, or put it aside until a job is done."""
        handler = self._handlers.get(request.opcode)
        try:
            if handler is None:
                self._answer(request.unique, errno.ENOSYS)
                return
            payload = handler(request)
        except NoReply:
            return
        except Pending as pending:
            self._park(request, pending.job)
        except OSError as error:
            self._answer(request.unique, error.errno or errno.EIO)
        except Exception as error:  # a fault of ours must not take the mount down
            complain(f"request {request.opcode} on {request.node}: {type(error).__name__}: {error}")
            self._answer(request.unique, errno.EIO)
        else:
            self._send(request.unique, payload)

    def _send(self, unique: int, payload: bytes | list[bytes | memoryview]) -> None:
        try:
            if isinstance(payload, bytes):
                os.write(self._device, fuse.OUT_HEADER.pack(16 + len(payload), 0, unique) + payload)
            else:
                size = 16 + sum(map(len, payload))
                os.writev(self._device, [fuse.OUT_HEADER.pack(size, 0, unique), *payload])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # its caller is gone, or the mount
                complain(f"answering the request {unique}: {error.strerror}")

    def _answer(self, unique: int, number: int) -> None:
        try:
            os.write(self._device, fuse.OUT_HEADER.pack(16, -number, unique))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                complain(f"answering the request {unique}: {error.strerror}")

    # Jobs

    def _park(self, request: Request, job: Job) -> None:
        request.data = memoryview(bytes(request.data))
        if job in self._parked:
            self._parked[job].append(request)
        else:
            self._parked[job] = [request]
            self._workers.start(job)

    def _finish_jobs(self) -> None:
        for job in self._workers.finished():
            requests = self._parked.pop(job, [])
            try:
                if job.then is not None:
                    job.then(job)
            except Pending as pending:
                for request in requests:
                    self._park(request, pending.job)
                continue
            except OSError as error:
                job.error = job.error or error
            except Exception as error:  # see _serve
                complain(f"after a job: {type(error).__name__}: {error}")
                job.error = job.error or error
            for request in requests:
                if job.error is None:
                    self._serve(request)
                else:
                    self._answer(request.unique, getattr(job.error, "errno", None) or errno.EIO)

    def _aside(self, request: Request, work: Callable[[], list[bytes | memoryview] | bytes]) -> NoReply:
        """Have a thread do the work and answer the request with what it returns."""

        def run() -> None:
            try:
                payload = work()
            except OSError as error:
                self._answer(request.unique, error.errno or errno.EIO)
            else:
                self._send(request.unique, payload)

        self._workers.start(Job(run))
        return NoReply()

    def _interrupt(self, request: Request) -> bytes:
        (unique,) = fuse.INTERRUPT_IN.unpack_from(request.data)
        for requests in self._parked.values():
            for parked in requests:
                if parked.unique == unique:
                    requests.remove(parked)
                    self._answer(unique, errno.EINTR)
                    raise NoReply
        raise NoReply

    # Names and attributes

    def _node(self, number: int) -> Node:
        try:
            return self._nodes[number]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    def _directory(self, number: int) -> Dir:
        node = self._node(number)
        if not isinstance(node, Dir):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return node

    def _attr(self, node: Node, info: os.stat_result) -> tuple[int, ...]:
        """What `fuse.ATTR` packs."""
        atime, atime_ns = divmod(info.st_atime_ns, _NS)
        mtime, mtime_ns = divmod(info.st_mtime_ns, _NS)
        ctime, ctime_ns = divmod(info.st_ctime_ns, _NS)
        mode, _, _, links, uid, gid, size, *_ = info
        if node.unlinked or node.kind == stat.S_IFDIR:
            links = self._tree.links(node, info)
        device = info.st_rdev and _device_number(info.st_rdev)
        return (
            *(node.ino, size, info.st_blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns),
            *(mode, links, uid, gid, device, info.st_blksize, 0),
        )

    def _entry(self, node: Node, info: os.stat_result) -> bytes:
        """A node that the kernel learns of."""
        attr = self._attr(node, info)
        node.lookups += 1
        return fuse.ENTRY_OUT.pack(node.ino, 0, _FOREVER, _FOREVER, 0, 0, *attr)

    def _lookup(self, request: Request) -> bytes:
        directory = self._directory(request.node)
        found = self._tree.find(directory, request.name())
        return _NO_ENTRY if found is None else self._entry(*found)

    def _forget(self, request: Request) -> bytes:
        self._tree.forget(request.node, *fuse.FORGET_IN.unpack_from(request.data))
        raise NoReply

    def _batch_forget(self, request: Request) -> bytes:
        (count,) = fuse.BATCH_FORGET_IN.unpack_from(request.data)
        start = fuse.BATCH_FORGET_IN.size
        for at in range(start, start + count * fuse.FORGET_ONE.size, fuse.FORGET_ONE.size):
            self._tree.forget(*fuse.FORGET_ONE.unpack_from(request.data, at))
        raise NoReply

    def _getattr(self, request: Request) -> bytes:
        node = self._node(request.node)
        return self._attributes(node, self._tree.status(node))

    def _attributes(self, node: Node, info: os.stat_result) -> bytes:
        return fuse.ATTR_OUT.pack(_FOREVER, 0, *self._attr(node, info))

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
            if not (node.names or node.fds) or (same and node.lower and times[1] == info.st_mtime_ns):
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

    def _readdirplus(self, request: Request) -> bytes | list[bytes | memoryview]:
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
        return self._opened(node, self._descriptor(node, flags, writing), writing=writing)

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

    def _opened(self, node: Node, fd: int, *, writing: bool) -> bytes:
        node.fds.append(fd)
        self._open[fd] = node
        if writing:
            self._written.add(fd)
        return fuse.OPEN_OUT.pack(fd, fuse.FOPEN_KEEP_CACHE)

    def _create(self, request: Request) -> bytes:
        flags, mode, umask, _ = fuse.CREATE_IN.unpack_from(request.data)
        name = request.name(fuse.CREATE_IN.size)
        directory = self._directory(request.node)
        found = self._tree.find(directory, name)
        if found is not None and not flags & os.O_EXCL:  # it was made meanwhile
            node, info = found
            self._copyup.node(node, contents=not flags & os.O_TRUNC)
            fd = self._descriptor(node, flags, True)
        else:
            node, info, fd = self._union.create(directory, name, flags, mode, umask, request.caller)
        return self._entry(node, info) + self._opened(node, fd, writing=True)

    def _tmpfile(self, request: Request) -> bytes:
        flags, mode, umask, _ = fuse.CREATE_IN.unpack_from(request.data)
        directory = self._directory(request.node)
        node, info, fd = self._union.unnamed(directory, flags, mode, umask, request.caller)
        return self._entry(node, info) + self._opened(node, fd, writing=True)

    def _release(self, request: Request) -> bytes:
        (fd,) = fuse.RELEASE_IN.unpack_from(request.data)
        node = self._open.pop(fd)
        node.fds.remove(fd)
        self._written.discard(fd)
        os.close(fd)
        self._tree.discard_unknown(node)
        return b""

    def _read(self, request: Request) -> list[bytes | memoryview]:
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
                    raise self._aside(request, lambda: _read_whole(copy, offset, size))
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
        raise self._aside(request, lambda: _sync(copy, data_only=bool(flags & fuse.FSYNC_FDATASYNC)))

    def _fsyncdir(self, request: Request) -> bytes:
        directory = self._directory(request.node)
        if directory.upper is None:
            return b""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._copyup.upper(directory))
        raise self._aside(request, lambda: _sync(fd, data_only=False))

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

        raise self._aside(request, seek)

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
        return _sized(os.getxattr(self._path(node), name, follow_symlinks=node.orphan >= 0), size)

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


_PLUS: Final = fuse.ENTRY_OUT.size + fuse.DIRENT.size


def complain(text: str) -> None:
    """Say on standard error, where the daemon still has one, what is not an answer to anybody."""
    print(f"layerfs-aufs: {text}", file=sys.stderr, flush=True)


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


def _read_whole(fd: int, offset: int, size: int) -> list[bytes | memoryview]:
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
