"""FICLONE: share a file's blocks with another file (a reflink), on btrfs, xfs and others."""

from __future__ import annotations

import errno
import fcntl

_FICLONE = 0x40049409  # _IOW(0x94, 9, int), ioctl_ficlone(2)

_CANNOT = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EISDIR})


def reflink(src_fd: int, dst_fd: int) -> bool:
    """Make the regular file ``dst_fd`` share all blocks of ``src_fd``; False where the file systems cannot do it.

    Raises `OSError` for anything else (ENOSPC, EDQUOT, EIO).
    """
    try:
        fcntl.ioctl(dst_fd, _FICLONE, src_fd)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True
