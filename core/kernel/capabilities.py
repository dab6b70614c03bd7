"""What a process may do without being asked who it is (capabilities(7)), of the calling thread alone."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

from layerfs.kernel.libc import check, libc

FSETID: Final = 4
SYS_ADMIN: Final = 21

_VERSION_3: Final = 0x20080522
_HEADER: Final = struct.pack("<Ii", _VERSION_3, 0)
_DATA: Final = struct.Struct("<IIIIII")  # effective, permitted, inheritable, and of each its upper half
_INITIAL_NAMESPACE: Final = 0xEFFFFFFD
"""The inode number of the host's user namespace (PROC_USER_INIT_INO of include/linux/proc_ns.h)."""


def on_host(capability: int) -> bool:
    """Whether this thread has a capability that counts everywhere, not in a user namespace of its own alone."""
    if os.stat("/proc/self/ns/user").st_ino != _INITIAL_NAMESPACE:
        return False
    return bool(_get()[0] >> capability & 1)


class Without:
    """A context in which the calling thread has not got a capability (below 32). It can be entered again and again."""

    def __init__(self, capability: int) -> None:
        effective, *others = _get()
        self._before = _DATA.pack(effective, *others)
        self._inside = _DATA.pack(effective & ~(1 << capability), *others)

    def __enter__(self) -> None:
        check(libc.capset(_HEADER, self._inside))

    def __exit__(self, *_: object) -> None:
        check(libc.capset(_HEADER, self._before))


def _get() -> tuple[int, ...]:
    data = ctypes.create_string_buffer(_DATA.size)
    check(libc.capget(_HEADER, data))
    return _DATA.unpack(data.raw)
