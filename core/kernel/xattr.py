"""getxattr(2) with a buffer that any value fits in.

`os.getxattr` asks with 128 bytes first and again with more where the kernel says that they are too few. To the first
question zfs-fuse may answer with success and eight wrong bytes.
"""

from __future__ import annotations

import ctypes
import os

from layerfs.kernel.libc import check, encoded, libc

_MAX = 1 << 16  # XATTR_SIZE_MAX of linux/limits.h


def get(file: int | str | bytes | os.PathLike[str], name: str | bytes, *, follow_symlinks: bool = True) -> bytes:
    """The value of one extended attribute of a descriptor, or of a path. Raises `OSError` as getxattr(2) does."""
    buffer = ctypes.create_string_buffer(_MAX)
    key = encoded(name)
    if isinstance(file, int):
        return ctypes.string_at(buffer, check(libc.fgetxattr(file, key, buffer, ctypes.c_size_t(_MAX))))
    call = libc.getxattr if follow_symlinks else libc.lgetxattr
    path = encoded(file)
    return ctypes.string_at(buffer, check(call(path, key, buffer, ctypes.c_size_t(_MAX)), path=path))
