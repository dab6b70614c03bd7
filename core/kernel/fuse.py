"""The kernel's side of FUSE: mounting, and the messages that are read from and written to /dev/fuse.

The names are the kernel's own (include/uapi/linux/fuse.h) without their prefix; protocol 7.31, Linux 5.4, or newer.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from layerfs.kernel import capabilities, ioctl, mountapi
from layerfs.kernel.libc import check, encoded, libc

ROOT_ID: Final = 1

# What the kernel asks for.
LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18
FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT, OPENDIR = 20, 21, 22, 23, 24, 25, 26, 27
FSYNCDIR, CREATE, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE = 30, 35, 36, 38, 42, 43
READDIRPLUS, RENAME2, LSEEK, COPY_FILE_RANGE, TMPFILE = 44, 45, 46, 47, 51

# Bits of SETATTR: which fields are to be set.
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME = 1, 2, 4, 8, 16, 32
FATTR_FH, FATTR_ATIME_NOW, FATTR_MTIME_NOW, FATTR_CTIME, FATTR_KILL_SUIDGID = 64, 128, 256, 1024, 2048

FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, FOPEN_PASSTHROUGH = 2, 32, 128
OPEN_KILL_SUIDGID = 1
WRITE_KILL_SUIDGID = 4
FSYNC_FDATASYNC = 1

# What a file system and the kernel agree on.
ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, DONT_MASK = 1 << 0, 1 << 3, 1 << 5, 1 << 6
DO_READDIRPLUS, ASYNC_DIO, WRITEBACK_CACHE, PARALLEL_DIROPS = 1 << 13, 1 << 15, 1 << 16, 1 << 18
POSIX_ACL, MAX_PAGES, CACHE_SYMLINKS, NO_OPENDIR_SUPPORT = 1 << 20, 1 << 22, 1 << 23, 1 << 24
EXPLICIT_INVAL_DATA, HANDLE_KILLPRIV_V2, INIT_EXT, PASSTHROUGH = 1 << 25, 1 << 28, 1 << 30, 1 << 37

IN_HEADER: Final = struct.Struct("<IIQQIII4x")  # length, opcode, unique, node, uid, gid, pid
OUT_HEADER: Final = struct.Struct("<IiQ")  # length, -errno, unique
_ATTR = "QQQqqqIIIIIIIIII"
"""ino, size, blocks, atime, mtime, ctime, the same in ns, mode, nlink, uid, gid, rdev, blksize, flags."""
ENTRY_OUT: Final = struct.Struct("<QQQQII" + _ATTR)
"""node, generation, how long the entry and the attributes are valid in s, the same in ns, attributes."""
ENTRY_HEAD: Final = ENTRY_OUT.size - struct.calcsize("<" + _ATTR)
"""Where the attributes begin in it."""
ENTRY_ATTR_VALID: Final = struct.calcsize("<QQQ")
"""Where it says how long they are valid."""
DIRENT: Final = struct.Struct("<QQII")  # ino, offset of the next one, length of the name, type

SETATTR_IN: Final = struct.Struct("<I4xQQ8xqqqIIII4xII4x")
"""valid, fh, size, atime, mtime, ctime, the same in ns, mode, uid, gid."""
MKNOD_IN: Final = struct.Struct("<III4x")  # mode, rdev, umask
MKDIR_IN: Final = struct.Struct("<II")  # mode, umask
RENAME_IN: Final = struct.Struct("<Q")  # new directory
RENAME2_IN: Final = struct.Struct("<QI4x")  # new directory, flags
LINK_IN: Final = struct.Struct("<Q")  # node
OPEN_IN: Final = struct.Struct("<II")  # flags, open flags
OPEN_OUT: Final = struct.Struct("<QIi")  # fh, open flags, number of the backing file
CREATE_IN: Final = struct.Struct("<IIII")  # flags, mode, umask, open flags
READ_IN: Final = struct.Struct("<QQI20x")  # fh, offset, size
WRITE_IN: Final = struct.Struct("<QQII16x")  # fh, offset, size, flags
WRITE_OUT: Final = struct.Struct("<I4x")  # size
STATFS_OUT: Final = struct.Struct("<QQQQQIII28x")  # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize
RELEASE_IN: Final = struct.Struct("<Q16x")  # fh
FSYNC_IN: Final = struct.Struct("<QI4x")  # fh, flags
SETXATTR_IN: Final = struct.Struct("<II")  # size, flags
GETXATTR_IN: Final = struct.Struct("<I4x")  # size
GETXATTR_OUT: Final = struct.Struct("<I4x")  # size
FALLOCATE_IN: Final = struct.Struct("<QQQI4x")  # fh, offset, length, mode
LSEEK_IN: Final = struct.Struct("<QQI4x")  # fh, offset, whence
LSEEK_OUT: Final = struct.Struct("<Q")  # offset
COPY_FILE_RANGE_IN: Final = struct.Struct("<QQQQQQQ")  # fh, offset, node to, fh to, offset to, length, flags
FORGET_IN: Final = struct.Struct("<Q")  # look-ups
BATCH_FORGET_IN: Final = struct.Struct("<I4x")  # count
FORGET_ONE: Final = struct.Struct("<QQ")  # node, look-ups
INTERRUPT_IN: Final = struct.Struct("<Q")  # unique

_INIT_IN = struct.Struct("<IIII")  # major, minor, max read-ahead, flags
_INIT_IN_2 = struct.Struct("<I")  # flags from bit 32 on
_INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
"""major, minor, max read-ahead, flags, max background, congestion, max write, granularity, max pages, 0, flags 2,
max stack depth."""
_NOTIFY_INVAL_INODE = 2
_INVAL_INODE = struct.Struct("<Qqq")  # node, offset, length (0: to the end)
_MAJOR, _MINOR = 7, 40
_OLDEST = 31

MAX_WRITE: Final = 1 << 20
BUFFER_SIZE: Final = MAX_WRITE + (1 << 16)
"""Bytes that a buffer must have to take any request."""
_BACKGROUND = 64

_STACK_DEPTH = 1
"""What is passed through to must not itself be stacked on something; on us one more may be."""
_PASSTHROUGH_SINCE = 41
"""Linux 6.12. Before it the kernel does not see by itself that a file has grown by what it has written."""
_STACKED = (0x65735546, 0x794C7630, 0xF15F)  # the f_type of statfs(2) that FUSE, overlay and eCryptfs have
_STATFS_SIZE = 256  # more than struct statfs has
_BACKING_MAP = struct.Struct("<iI8x")  # descriptor, flags
_BACKING_OPEN = ioctl.iow(229, 1, _BACKING_MAP.size)
_BACKING_ID = struct.Struct("<I")
_BACKING_CLOSE = ioctl.iow(229, 2, _BACKING_ID.size)

_COMMFD = "_FUSE_COMMFD"


class Granted(NamedTuple):
    """What the kernel and the file system agreed on.

    Attributes:
        flags: those of the wanted ones that the kernel knows.
        minor: the kernel's protocol version.
    """

    flags: int
    minor: int


def mount(target: str, subtype: str, source: str, options: Sequence[str], flags: int) -> int:
    """Mount a FUSE file system at ``target`` and return its /dev/fuse, which does not block.

    With the privilege this is mount(2), otherwise fusermount3(1) does it. Its type is ``fuse.SUBTYPE``.

    Args:
        options: FUSE's own (``default_permissions``, ``allow_other``).
        flags: ``MS_…`` of `layerfs.kernel.mountapi`.

    Raises `OSError`; of fusermount3 with its own words.
    """
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = ["rootmode=40000", f"user_id={os.geteuid()}", f"group_id={os.getegid()}", *options]
    try:
        raw = encoded(",".join([f"fd={fd}", *data]))
        check(libc.mount(encoded(source), encoded(target), encoded(f"fuse.{subtype}"), flags, raw), path=target)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EPERM:
            raise
        fd = _mount_by_helper(target, subtype, source, options, flags)
    os.set_blocking(fd, False)
    return fd


def unmount(target: str) -> None:
    """Take the mount from the file tree at once, and from the kernel when nobody uses it any more."""
    try:
        mountapi.umount(target, mountapi.MNT_DETACH | mountapi.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        unmount_by_helper(target, lazy=True)


def unmount_by_helper(target: str, *, lazy: bool) -> None:
    """`umount2` for a user without privileges, by fusermount3(1). Raises `OSError` with its own words."""
    _run(["fusermount3", "-u", *(["-z"] if lazy else []), "--", target])


def negotiate(fd: int, wanted: int, *, read_ahead: int = 1 << 20) -> Granted:
    """Answer the kernel's first message, INIT. Blocks until it is there. Raises `OSError`.

    `WRITEBACK_CACHE` and `PASSTHROUGH` exclude each other; who wants both gets the latter from Linux 6.12 on.
    """
    buffer = bytearray(BUFFER_SIZE)
    os.set_blocking(fd, True)
    try:
        length = os.readv(fd, [buffer])
        _, opcode, unique, *_ = IN_HEADER.unpack_from(buffer)
        major, minor, ahead, offered = _INIT_IN.unpack_from(buffer, IN_HEADER.size)
        if opcode != INIT or major != _MAJOR or minor < _OLDEST:
            raise OSError(errno.EPROTO, f"the kernel's FUSE is {major}.{minor}; Linux 5.4 or newer is needed")
        if offered & INIT_EXT and length >= IN_HEADER.size + _INIT_IN.size + _INIT_IN_2.size:
            offered |= _INIT_IN_2.unpack_from(buffer, IN_HEADER.size + _INIT_IN.size)[0] << 32
        flags = offered & (wanted | INIT_EXT)
        if minor < _PASSTHROUGH_SINCE:
            flags &= ~PASSTHROUGH
        if flags & PASSTHROUGH:
            flags &= ~WRITEBACK_CACHE
        _reply(
            fd,
            unique,
            _INIT_OUT.pack(
                _MAJOR,
                min(minor, _MINOR),
                min(ahead, read_ahead),
                flags & 0xFFFFFFFF,
                _BACKGROUND,
                _BACKGROUND * 3 // 4,
                MAX_WRITE,
                1,
                MAX_WRITE // 4096,
                0,
                flags >> 32,
                _STACK_DEPTH if flags & PASSTHROUGH else 0,
            ),
        )
    finally:
        os.set_blocking(fd, False)
    return Granted(flags, minor)


def inval_inode(node: int) -> bytes:
    """The message that has the kernel write back and drop what it has cached of a file's contents.

    Whoever writes it to /dev/fuse waits for that, and so must not be the one who serves the requests that it leads to.
    """
    return _inval(node, 0)


def inval_attributes(node: int) -> bytes:
    """The message that has the kernel ask again for a node's attributes. It leads to no request, and waits for none."""
    return _inval(node, -1)


def can_pass_through(branches: Iterable[int]) -> bool:
    """Whether `PASSTHROUGH`, where the kernel has it, can be used for files of the directories ``branches``."""
    return capabilities.on_host(capabilities.SYS_ADMIN) and not any(map(_is_stacked, branches))


def backing_open(device: int, fd: int) -> int:
    """Let the kernel read and write, by itself, the regular file that ``fd`` has open; the number to call that by.

    It does so with this thread's credentials. Needs `PASSTHROUGH`, and CAP_SYS_ADMIN on the host. Raises `OSError`:
    ELOOP where the file is on a file system that is stacked on others.
    """
    return int(fcntl.ioctl(device, _BACKING_OPEN, bytearray(_BACKING_MAP.pack(fd, 0))))


def backing_close(device: int, number: int) -> None:
    """Take the number back. Files that are open by it stay so."""
    fcntl.ioctl(device, _BACKING_CLOSE, _BACKING_ID.pack(number))


def _inval(node: int, offset: int) -> bytes:
    size = OUT_HEADER.size + _INVAL_INODE.size
    return OUT_HEADER.pack(size, _NOTIFY_INVAL_INODE, 0) + _INVAL_INODE.pack(node, offset, 0)


def _is_stacked(fd: int) -> bool:
    """Whether the kernel refuses a file system, or may, as one to stack on."""
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    check(libc.fstatfs(fd, buffer))
    return ctypes.c_long.from_buffer(buffer).value in _STACKED


def _reply(fd: int, unique: int, payload: bytes) -> None:
    os.write(fd, OUT_HEADER.pack(OUT_HEADER.size + len(payload), 0, unique) + payload)


def _mount_by_helper(target: str, subtype: str, source: str, options: Sequence[str], flags: int) -> int:
    """Have fusermount3, which is set-user-ID root, mount and pass the descriptor over a socket."""
    import array  # late, as below: root needs none of it, and a daemon should start quickly
    import socket

    words = [word for flag, word in ((mountapi.MS_RDONLY, "ro"), (mountapi.MS_NOATIME, "noatime")) if flags & flag]
    source = source.replace("\\", "\\\\").replace(",", "\\,")
    given = ",".join([*words, "nosuid", "nodev", *options, f"subtype={subtype}", f"fsname={source}"])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _run(
            ["fusermount3", "-o", given, "--", target],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, _COMMFD: str(theirs.fileno())},
        )
        fds = array.array("i", [-1])
        _, ancillary, *_ = ours.recvmsg(1, socket.CMSG_SPACE(fds.itemsize))
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds = array.array("i", raw)
    if fds[0] < 0:
        raise OSError(errno.EPROTO, "fusermount3 has not handed over its descriptor")
    os.set_inheritable(fds[0], False)
    return fds[0]


def _run(command: list[str], pass_fds: Sequence[int] = (), env: dict[str, str] | None = None) -> None:
    import subprocess

    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, pass_fds=pass_fds, env=env
        )
    except FileNotFoundError as error:
        text = f"{command[0]} is not installed, and without it only root mounts; apt-get install fuse3"
        raise OSError(errno.ENOENT, text) from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip() or f"{command[0]} ended with {done.returncode}"
        busy = "busy" in words
        raise OSError(errno.EBUSY if busy else errno.EPERM, words)
