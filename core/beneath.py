"""Opening what is in a tree by its path from the tree's root: never through a link, and however deep it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from layerfs.kernel.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2

_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RESOLVE: Final = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
_PART: Final = 3500
"""A path is opened in parts of this length: PATH_MAX is 4096, but a tree can be deeper than a path can name."""

_KEPT: Final = 64
"""So many directories above the one at hand stay open: a tree can be deeper than the limit of descriptors."""


def open_directory(root: int, path: bytes) -> int:
    """A new descriptor for the directory ``path`` below the directory ``root``; ``b""`` is the root itself.

    Raises `OSError`: ELOOP and ENOTDIR where a link or a file is in the way.
    """
    fd = root
    try:
        while len(path) > _PART:
            cut = path.rindex(b"/", 0, _PART)
            fd, above = openat2(fd, path[:cut], _FLAGS, resolve=_RESOLVE), fd
            if above != root:
                os.close(above)
            path = path[cut + 1 :]
        return openat2(fd, path or b".", _FLAGS, resolve=_RESOLVE)
    finally:
        if fd != root:
            os.close(fd)


@contextmanager
def directory(root: int, path: bytes) -> Iterator[int]:
    """`open_directory` for the body of a ``with``."""
    fd = open_directory(root, path)
    try:
        yield fd
    finally:
        os.close(fd)


def names(fd: int) -> list[bytes]:
    """The names in the open directory ``fd``, sorted bytewise."""
    return sorted(os.listdir(b"/proc/self/fd/%d" % fd))


class Directories:
    """The directory at hand and those above it, open, for going through a tree in depth-first order.

    Args:
        root: directory descriptor of the tree, which stays open.
    """

    def __init__(self, root: int) -> None:
        self._open = [(b"", root)]

    def enter(self, path: bytes) -> int:
        """A descriptor for the directory ``path``, open until another one is entered. Raises like `open_directory`."""
        above, fd = self._open[-1]
        if above == path:
            return fd
        while above and not (path + b"/").startswith(above + b"/"):
            self._leave()
            above, fd = self._open[-1]
        if above == path:
            return fd
        below = path[len(above) + 1 :] if above else path
        fd = open_directory(fd, below) if b"/" in below else os.open(below, _FLAGS, dir_fd=fd)
        if len(self._open) > _KEPT:
            self._leave()
        self._open.append((path, fd))
        return fd

    def close(self) -> None:
        while len(self._open) > 1:
            self._leave()

    def _leave(self) -> None:
        os.close(self._open.pop()[1])
