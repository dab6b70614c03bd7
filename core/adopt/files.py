"""Files below the data directory of another program, which has made their names: none leads out of it."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import PurePosixPath
from typing import BinaryIO, Final

from layerfs import oci
from layerfs.errors import BadLayer, refused
from layerfs.kernel.openat2 import RESOLVE_BENEATH, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2

_LARGEST: Final = 256 << 20
"""Bytes of a list of layers; podman's has some hundred for each."""


class Files:
    """The files below a directory.

    Args:
        root: its descriptor, which stays the caller's.
        name: its path, for error texts.
    """

    def __init__(self, root: int, name: str) -> None:
        self._root = root
        self.name = name

    def has(self, *parts: str) -> bool:
        """Whether something is there."""
        try:
            os.close(self._open(os.O_PATH, parts))
        except OSError:
            return False
        return True

    def read(self, *parts: str, longest: int = _LARGEST) -> bytes:
        """A file's content. Raises `BadLayer` where it is missing or too long."""
        with self.open(*parts) as file:
            data = file.read(longest + 1)
        if len(data) > longest:
            raise BadLayer(f"{self.path(*parts)} is longer than {longest} bytes")
        return data

    def text(self, *parts: str) -> str:
        """A short file's text, without white space around it. Raises `BadLayer`."""
        try:
            return self.read(*parts, longest=oci.LONGEST).decode().strip()
        except UnicodeDecodeError:
            raise BadLayer(f"{self.path(*parts)} is no text") from None

    def open(self, *parts: str) -> BinaryIO:
        """A regular file. Raises `BadLayer` where there is none."""
        try:
            # Not waiting for a fifo's writer.
            fd = self._open(os.O_RDONLY | os.O_NONBLOCK, parts)
        except (FileNotFoundError, NotADirectoryError):
            raise BadLayer(f"{self.path(*parts)} is missing") from None
        except OSError as error:
            raise refused(f"opening {self.path(*parts)}", error) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BadLayer(f"{self.path(*parts)} is no regular file")
        return open(fd, "rb")

    def directory(self, *parts: str) -> int:
        """A descriptor of a directory, to be closed. Raises `BadLayer` where there is none."""
        try:
            return self._open(os.O_PATH | os.O_DIRECTORY, parts)
        except (FileNotFoundError, NotADirectoryError):
            raise BadLayer(f"the directory {self.path(*parts)} is missing") from None
        except OSError as error:
            raise refused(f"opening {self.path(*parts)}", error) from error

    def names(self, *parts: str) -> list[str]:
        """What is in a directory, sorted; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fd = self._open(os.O_RDONLY | os.O_DIRECTORY, parts)
            try:
                return sorted(os.listdir(fd))
            finally:
                os.close(fd)
        return []

    def path(self, *parts: str) -> str:
        """A path for error texts."""
        return repr(str(PurePosixPath(self.name, *parts)))

    def _open(self, flags: int, parts: tuple[str, ...]) -> int:
        return openat2(self._root, "/".join(parts), flags, resolve=RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)


def opened_within(directory: int, name: bytes) -> BinaryIO:
    """A regular file of a layer's tree, in which links lead as they would for a container. Raises `OSError`."""
    fd = openat2(
        directory, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
    )
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(f"{os.fsdecode(name)!r} is no regular file")
    return open(fd, "rb", buffering=0)
