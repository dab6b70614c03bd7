"""The page cache's state for a file: brought about, and checked rather than assumed."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_COLD_AT_MOST = 0.02
_WARM_AT_LEAST = 0.98
_ATTEMPTS = 3
_CHUNK = 1 << 20
_ARC = Path("/proc/spl/kstat/zfs/arcstats")

SETTLING = 0.3
"""Seconds after the caches were dropped, in which other programs read back what was theirs."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_MAP_FAILED = ctypes.c_void_p(-1).value


class CacheState(enum.StrEnum):
    ANY = "any"
    """Nothing is asked of it."""
    COLD = "cold"
    """Not a page of the file is cached, nor its inode where this process may drop those."""
    WARM = "warm"
    """The whole file is cached, read through the layer."""


@dataclass(frozen=True, slots=True)
class Reached:
    """The cache state that a measurement really began in.

    Attributes:
        asked: what the workload wanted.
        how: the means used: ``drop_caches``, ``fadvise`` or ``read``.
        resident: the part of the file that was cached, 0 to 1, as mincore(2) says.
    """

    asked: CacheState
    how: str
    resident: float

    @property
    def as_asked(self) -> bool:
        return self.resident <= _COLD_AT_MOST if self.asked is CacheState.COLD else self.resident >= _WARM_AT_LEAST


def establish(state: CacheState, *files: Path) -> Reached:
    """Bring ``files`` of one size into ``state`` (cold or warm) and say how far that went.

    Cold: dirty data is written back; then ``/proc/sys/vm/drop_caches``, which only root of the host may write, drops
    every copy (lower, upper, backing device); otherwise posix_fadvise(2) drops the files' own pages.
    """
    how, share = "", 1.0
    for _ in range(_ATTEMPTS):
        how = _cool(files) if state is CacheState.COLD else read(files)
        share = sum(map(resident, files)) / len(files)
        if Reached(state, how, share).as_asked:
            break
    if state is CacheState.COLD:
        _cool(files)  # the look at them has brought names and inodes back
        time.sleep(SETTLING)
    return Reached(state, how, share)


def read(files: Sequence[Path]) -> str:
    """Read each file once from beginning to end; the word for it in `Reached`."""
    buffer = bytearray(_CHUNK)
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    return "read"


def read_mapped(file: Path) -> None:
    """Read a byte of each page through a mapping, as the code of programs is read (mmap(2))."""
    with open(file, "rb") as source, mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ) as pages:
        _ = pages[:: mmap.PAGESIZE]


def resident(file: Path) -> float:
    """The part of the file's pages that the page cache holds, 0 to 1; 0 for an empty file.

    See mincore(2), which tells it only to a process that owns the file or may write to it. A union's merged path is
    answered by the real file that it shows.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        length = os.fstat(descriptor).st_size
        return _resident(descriptor, length) if length else 0.0
    finally:
        os.close(descriptor)


def own_cache() -> int | None:
    """Bytes in the cache that ZFS keeps beside the page cache (its ARC); None where the kernel has none.

    See zfs(4); files of a ZFS in the kernel are in the page cache only while they are mapped.
    """
    with contextlib.suppress(OSError):
        for line in _ARC.read_text().splitlines():
            if line.split()[:1] == ["size"]:
                return int(line.split()[2])
    return None


def write_back(*places: Path) -> None:
    """Have the file systems of ``places`` on the disk, so that no earlier write is paid for later; see syncfs(2)."""
    for place in places:
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(descriptor):
                raise _error()
        finally:
            os.close(descriptor)


def _resident(descriptor: int, length: int) -> float:
    pages = -(-length // mmap.PAGESIZE)
    # PROT_NONE maps without reading a page.
    address = _libc.mmap(None, length, 0, mmap.MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        raise _error()
    try:
        answer = ctypes.create_string_buffer(pages)
        if _libc.mincore(address, length, answer):
            raise _error()
        return sum(byte & 1 for byte in answer.raw) / pages
    finally:
        _libc.munmap(address, length)


def _cool(files: Sequence[Path]) -> str:
    write_back(files[0])
    try:
        with open("/proc/sys/vm/drop_caches", "w") as control:
            control.write("3")
    except OSError:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        return "fadvise"
    return "drop_caches"


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
