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
