"""name_to_handle_at(2): the file handle, by which a file system knows an inode whatever its names are."""

from __future__ import annotations

import ctypes
import errno
import struct

from layerfs.kernel.libc import check, encoded, libc

_MAX_HANDLE = 128
_HEAD = struct.Struct("=Ii")


def file_handle(dir_fd: int, name: bytes) -> tuple[int, bytes]:
    """The handle's type and bytes for ``name`` in ``dir_fd``, which is not followed if it is a link.

    Raises `OSError` (EOPNOTSUPP: this file system has no handles).
    """
    handle = ctypes.create_string_buffer(_HEAD.pack(_MAX_HANDLE, 0), _HEAD.size + _MAX_HANDLE)
    mount_id = ctypes.c_int()
    check(libc.name_to_handle_at(dir_fd, encoded(name), handle, ctypes.byref(mount_id), 0), path=name)
    size, kind = _HEAD.unpack_from(handle.raw)
    if size > _MAX_HANDLE:
        raise OSError(errno.EOVERFLOW, "file handle longer than the kernel's limit")
    return kind, handle.raw[_HEAD.size : _HEAD.size + size]
