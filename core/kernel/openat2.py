"""openat2(2): open a path below a directory with the kernel itself refusing to leave it."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct

from layerfs.kernel.libc import libc

RESOLVE_NO_XDEV = 0x01
"""Do not cross into another mount (EXDEV)."""
RESOLVE_NO_MAGICLINKS = 0x02
"""Do not follow the links of /proc that lead anywhere (ELOOP)."""
RESOLVE_NO_SYMLINKS = 0x04
"""Do not follow any symbolic link (ELOOP)."""
RESOLVE_BENEATH = 0x08
"""Refuse absolute paths and links, and ``..`` that would climb above the directory (EXDEV)."""
RESOLVE_IN_ROOT = 0x10
"""Treat the directory as the root, as chroot(2) would: absolute links and ``..`` stay inside."""

# The same number on every architecture; see include/uapi/asm-generic/unistd.h.
_NUMBER = 437
_call = ctypes.CFUNCTYPE(
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_size_t,
    use_errno=True,
)(("syscall", libc))

# A rename or mount anywhere on the machine makes a look-up with ".." in it answer EAGAIN; it is then to be repeated.
_TRIES = 1000


@functools.lru_cache(maxsize=256)
def _how(flags: int, mode: int, resolve: int) -> bytes:
    """The packed ``struct open_how``."""
    return struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)


def openat2(dir_fd: int, path: bytes | str, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """Open ``path`` relative to ``dir_fd`` and return the descriptor, which is always close-on-exec.

    ``mode`` may only be given with ``O_CREAT`` or ``O_TMPFILE``. Raises `OSError` as the manual page openat2(2) lists
    (ELOOP and EXDEV for what ``resolve`` forbids). Needs Linux 5.6.
    """
    raw = os.fsencode(path) if isinstance(path, str) else path
    if b"\0" in raw:  # C would see only what stands before it
        raise OSError(errno.EINVAL, "name with a NUL byte", os.fsdecode(raw))
    for _ in range(_TRIES):
        fd: int = _call(_NUMBER, dir_fd, raw, _how(flags, mode, resolve), 24)
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(number, os.strerror(number), os.fsdecode(raw))
