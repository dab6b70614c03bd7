"""aufs' names on disk: whiteouts, opaque directories, and what is reserved (aufs(5), "Whiteout").

``.wh.NAME`` hides NAME of the branches below, ``.wh..wh.opq`` all that they have in the directory. No other name may
begin with ``.wh.``. Entries of the same branch are not hidden.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Final

from layerfs.treecopy import remove_tree

PREFIX: Final = b".wh."
OPAQUE: Final = b".wh..wh..opq"
LONGEST_HIDDEN: Final = 255 - len(PREFIX)
"""Bytes of the longest name that a whiteout can be made for."""

_BOOKKEEPING: Final = b".wh..wh."
_MODE: Final = 0o444


def whiteout(name: bytes) -> bytes:
    """The name of the file that hides ``name``."""
    return PREFIX + name


def hidden_by(name: bytes) -> bytes | None:
    """The name that an entry of a branch hides: ``b""`` for aufs' own files, None for anything but a whiteout."""
    if not name.startswith(PREFIX):
        return None
    return b"" if name.startswith(_BOOKKEEPING) else name[len(PREFIX) :]


def make(dir_fd: int, name: bytes) -> None:
    """Make the empty file ``name``, a whiteout or an opaque mark; one that is there already is no error."""
    with contextlib.suppress(FileExistsError):
        os.close(
            os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE, dir_fd=dir_fd)
        )


def take_away(dir_fd: int, name: bytes) -> None:
    """Remove a whiteout or an opaque mark, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=dir_fd)


def make_opaque(dir_fd: int) -> None:
    """Make the mark of a directory that hides what lower branches have in it."""
    keeping_times(dir_fd, lambda: make(dir_fd, OPAQUE))


def take_opaque(dir_fd: int) -> None:
    """Undo `make_opaque`."""
    keeping_times(dir_fd, lambda: take_away(dir_fd, OPAQUE))


def keeping_times(dir_fd: int, change: Callable[[], None]) -> None:
    """Do something in a directory that is no change of it for users."""
    info = os.stat(dir_fd)
    change()
    os.utime(".", ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=dir_fd)


class AufsWhiteouts:
    """Deletions as aufs marks them, see `layerfs.driver.Whiteouts`."""

    def hide(self, dir_fd: int, name: bytes) -> None:
        remove_tree(dir_fd, name)
        if len(name) > LONGEST_HIDDEN:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fsdecode(name))
        make(dir_fd, whiteout(name))

    def make_opaque(self, dir_fd: int) -> None:
        make(dir_fd, OPAQUE)
