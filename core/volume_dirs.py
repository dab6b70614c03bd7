"""Where a driver's volumes lie when each is one entry of the driver's root, and how they come and go in one step.

A volume is made aside as ``.new-VOLUME`` and renamed when it is whole; it is renamed to ``.rm-VOLUME`` before it is
taken apart. So whatever stands under the plain name is whole, and what a crash left is still found under its own name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from layerfs import mount_table
from layerfs.errors import FailedPrecondition

_NEW, _CONDEMNED = ".new-", ".rm-"
_OF_EXT4 = "lost+found"  # in the root of its file systems, and made anew by e2fsck where it was removed


class VolumeDirs:
    """The volumes below ``root``; ``destroy`` takes a directory away with all that it holds, or finds it gone."""

    def __init__(self, root: Path, destroy: Callable[[Path], None]) -> None:
        self._root = root
        self._destroy = destroy

    def path(self, volume: str) -> Path:
        return self._root / volume

    def exists(self, volume: str) -> bool:
        """Whether the volume is there as a whole."""
        return self.path(volume).exists()

    @contextmanager
    def made(self, volume: str) -> Iterator[Path]:
        """Yield the place, where nothing is yet, at which the body makes the volume; it gets its name at the end."""
        place = self._root / f"{_NEW}{volume}"
        self._destroy(place)
        yield place
        os.rename(place, self.path(volume))

    def remove(self, volume: str) -> None:
        """Take a volume away, whole or half made. Raises `FailedPrecondition` where something is mounted on it."""
        condemned = self._root / f"{_CONDEMNED}{volume}"
        self._destroy(self._root / f"{_NEW}{volume}")
        self._destroy(condemned)
        # A mount inside would stop it when it has been taken apart half-way.
        if mount_table.below(self.path(volume)):
            raise _in_use(volume)
        try:
            os.rename(self.path(volume), condemned)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise _in_use(volume) from error
            raise
        self._destroy(condemned)

    def names(self) -> Iterator[str]:
        """Every volume, whole or half made, once."""
        seen: set[str] = set()
        for name in os.listdir(self._root):
            volume = name.removeprefix(_NEW).removeprefix(_CONDEMNED)
            if not volume.startswith(".") and volume not in (*seen, _OF_EXT4):
                seen.add(volume)
                yield volume


def _in_use(volume: str) -> FailedPrecondition:
    return FailedPrecondition(f"removing the volume {volume!r}: something is mounted on it; unmount it first")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of the directory ``path``."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
