"""Space that a store sets aside, so that layers can be removed from a disk that is full to the last block.

A store whose data lie beside its database can be filled by what runs on it. To remove a layer, the database has to be
written to first, which takes blocks that are not there then. So there is a file that holds some, and that is given up
where they are needed: by opening a store and by removing from it, and by nothing that only adds to it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

_SIZE: Final = 8 << 20
"""Bytes that are set aside: a write-ahead log of SQLite grows to half of that before it begins anew."""
_LOW: Final = 1 << 20
"""With fewer bytes free than that, what is set aside is given up."""


class Reserve:
    """The space that one store sets aside.

    Args:
        path: of the file, on the file system of the database.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def hold(self) -> None:
        """Have the space set aside again, if there is as much."""
        with contextlib.suppress(OSError):
            if self._is_held() or self._free() < 2 * _SIZE:
                return
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, _SIZE)
            except OSError:
                self._path.unlink(missing_ok=True)
            finally:
                os.close(fd)

    def use(self) -> None:
        """Give the space up where the disk is full."""
        with contextlib.suppress(OSError):
            if self._free() < _LOW and not self._fits(_LOW):
                self._path.unlink(missing_ok=True)

    def _is_held(self) -> bool:
        try:
            return self._path.stat().st_size == _SIZE
        except FileNotFoundError:
            return False

    def _free(self) -> int:
        info = os.statvfs(self._path.parent)
        return info.f_frsize * info.f_bavail

    def _fits(self, size: int) -> bool:
        """Whether there is room for so much, of what a file system keeps for root too."""
        try:
            fd = os.open(self._path.parent, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
            finally:
                os.close(fd)
        except OSError:
            return False
        return True
