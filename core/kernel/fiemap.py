"""FIEMAP: where a file's data lies on its file system (Documentation/filesystems/fiemap.rst)."""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterator

from layerfs.kernel.ioctl import iowr

_HEAD = struct.Struct("=QQIIII")  # start, length, flags, extents filled in, room for, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_FIEMAP = iowr(0x66, 11, _HEAD.size)

_SYNC, _LAST, _UNKNOWN = 1, 1, 2
_AT_ONCE = 512


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """The places on the device, (start, length) in bytes, of what is allocated for the regular file ``fd``.

    Raises `OSError` (EOPNOTSUPP: the file system cannot tell).
    """
    start = 0
    while True:
        buffer = bytearray(_HEAD.size + _AT_ONCE * _EXTENT.size)
        _HEAD.pack_into(buffer, 0, start, (1 << 64) - 1 - start, _SYNC, 0, _AT_ONCE, 0)
        fcntl.ioctl(fd, _FIEMAP, buffer)
        count = _HEAD.unpack_from(buffer)[3]
        flags = _LAST
        for index in range(count):
            logical, physical, length, flags = _EXTENT.unpack_from(buffer, _HEAD.size + index * _EXTENT.size)
            start = logical + length
            if not flags & _UNKNOWN:
                yield physical, length
        if not count or flags & _LAST:
            return
