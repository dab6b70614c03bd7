"""Byte-range locks in one file: which sessions are alive, and who may do what only one may do at a time.

They are open file description locks (fcntl(2), ``F_OFD_SETLK``): the kernel drops them when the last descriptor of the
description closes, however its process ends, so that there are no leftovers and no process numbers to mistake.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# struct flock: type, whence, start, length, pid (which has to be 0).
_FLOCK = struct.Struct("@hhqqi0q")

# Session n is byte n. Places for other purposes are far above any of them.
SETUP = 1 << 60
"""The byte to hold while the backing or the list of sessions changes."""
_LAYERS, _CONTENTS = 1 << 61, 1 << 62


def layer_byte(number: int) -> int:
    """The byte to hold while the mounts of the layer with this row number change."""
    return _LAYERS + number


def content_byte(digest: str) -> int:
    """The byte to hold while the content with this digest is unpacked."""
    return _CONTENTS + int(digest.rpartition(":")[2][:14], 16)


class LockFile:
    """The lock file of a store, made where there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = self._open()

    def hold(self, session: int) -> None:
        """Show for as long as this object is open that the session lives."""
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, session))

    def keep_through_exec(self) -> None:
        """Let what this object holds stay held by the program that this process becomes."""
        os.set_inheritable(self._fd, True)

    def is_held(self, session: int) -> bool:
        """Whether another object (in whatever process) holds the session."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, session))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    @contextmanager
    def exclusive(self, *places: int) -> Iterator[None]:
        """Hold bytes that no other thread or process holds; waits for them."""
        fd = self._open()
        try:
            for place in sorted(set(places)):  # one order for all, so that no two wait for each other
                fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _flock(fcntl.F_WRLCK, place))
            yield
        finally:
            os.close(fd)

    @contextmanager
    def tried(self, place: int) -> Iterator[bool]:
        """Hold a byte if nobody else does; whether it is held."""
        fd = self._open()
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, place))
            held = True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                os.close(fd)
                raise
            held = False
        try:
            yield held
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def living(locks: LockFile, sessions: Iterable[int]) -> set[int]:
    """Those of ``sessions`` that somebody else holds."""
    return {session for session in sessions if locks.is_held(session)}


def _flock(kind: int, place: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)
