"""Project quota on ext4 and xfs: a limit for the bytes below a directory (quotactl(2), FS_IOC_FSSETXATTR).

A file belongs to the project of the directory that it is made in. ext4 does not hold a process with CAP_SYS_RESOURCE
to the limit (overlayfs gives that capability up for its own writes), xfs holds everyone to it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass

from layerfs.kernel.ioctl import ior, iow
from layerfs.kernel.libc import check, syscall

_FSXATTR = struct.Struct("=5I8s")
_FSGETXATTR, _FSSETXATTR = ior(0x58, 31, _FSXATTR.size), iow(0x58, 32, _FSXATTR.size)
_PROJECT_INHERIT = 0x200

_QUOTACTL_FD = 443
_PROJECT = 2
_GETQUOTA, _SETQUOTA, _XGETQSTATV = 0x800007, 0x800008, 0x5808
_DQBLK = struct.Struct("=8QI4x")  # struct if_dqblk
_LIMIT_UNIT = 1024
_SPACE_LIMIT_VALID = 1
_PROJECT_ENFORCED = 1 << 5

_UNSUPPORTED = frozenset(
    {errno.ENOSYS, errno.ESRCH, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOTBLK}
)


@dataclass(frozen=True, slots=True)
class ProjectUsage:
    """What a project holds: bytes and inodes, and the most bytes that it may hold (0: no limit)."""

    space: int
    inodes: int
    limit: int


def supported(path: str | os.PathLike[str]) -> bool:
    """Whether project quota is enforced on the file system of ``path`` and this process may set it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not _enforced(fd):
            return False
        set_limit(fd, _PROBE_PROJECT, 0)
        return project(fd) is not None
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    finally:
        os.close(fd)


_PROBE_PROJECT = (1 << 32) - 2


def project(fd: int) -> int:
    """The project that a file or directory belongs to; 0 is the one without limits."""
    return int(_attributes(fd)[3])


def set_project(fd: int, number: int) -> None:
    """Put a file or directory into a project; what is made in the directory later inherits it."""
    flags, extent_size, extents, _, cow_size, padding = _attributes(fd)
    if os.path.isdir(fd):
        flags |= _PROJECT_INHERIT
    fcntl.ioctl(fd, _FSSETXATTR, _FSXATTR.pack(flags, extent_size, extents, number, cow_size, padding))


def set_limit(fd: int, number: int, size: int) -> None:
    """Let the project hold at most ``size`` bytes, rounded up to KiB, on the file system of ``fd``; 0: any number."""
    blocks = -(-size // _LIMIT_UNIT)
    buffer = ctypes.create_string_buffer(_DQBLK.pack(blocks, 0, 0, 0, 0, 0, 0, 0, _SPACE_LIMIT_VALID))
    _quotactl(fd, _SETQUOTA, number, buffer)


def usage(fd: int, number: int) -> ProjectUsage:
    """What the project holds on the file system of ``fd``."""
    buffer = ctypes.create_string_buffer(_DQBLK.size)
    _quotactl(fd, _GETQUOTA, number, buffer)
    blocks, _, space, _, _, inodes, *_ = _DQBLK.unpack(buffer.raw[: _DQBLK.size])
    return ProjectUsage(space, inodes, blocks * _LIMIT_UNIT)


def _attributes(fd: int) -> tuple[int, int, int, int, int, bytes]:
    raw = bytearray(_FSXATTR.size)
    fcntl.ioctl(fd, _FSGETXATTR, raw)
    flags, extent_size, extents, number, cow_size, padding = _FSXATTR.unpack(raw)
    return flags, extent_size, extents, number, cow_size, padding


def _enforced(fd: int) -> bool:
    buffer = ctypes.create_string_buffer(b"\1", 512)  # struct fs_quota_statv, which begins with its version
    _quotactl(fd, _XGETQSTATV, 0, buffer)
    (flags,) = struct.unpack_from("=H", buffer.raw, 2)
    return bool(flags & _PROJECT_ENFORCED)


def _quotactl(fd: int, command: int, number: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
    """quotactl_fd(2), Linux 5.14."""
    check(syscall(_QUOTACTL_FD, fd, command << 8 | _PROJECT, number, ctypes.byref(buffer)))
