"""Directories of the branches, and a limited number of descriptors of them.

A tree has more directories than a process may have descriptors, so they are opened when they are needed, each from its
parent: no path is ever too long, and no link is followed.
"""

from __future__ import annotations

import os
from typing import Final

_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Place:
    """One directory of one branch.

    Attributes:
        parent: the directory that it lies in; None for a branch's root, and for one that has been removed.
        name: its name there.
        fd: an O_PATH descriptor of it, or -1; `Places.fd` gives it.
    """

    __slots__ = ("fd", "name", "parent")

    def __init__(self, parent: Place | None, name: bytes, fd: int = -1) -> None:
        self.parent = parent
        self.name = name
        self.fd = fd


class Places:
    """Opens places; ``limit`` is how many stay open."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: list[Place] = []

    def fd(self, place: Place) -> int:
        """The descriptor of a place, which is good until `relax`."""
        if place.fd >= 0:
            return place.fd
        closed = [place]
        while (parent := closed[-1].parent) is not None and parent.fd < 0:
            closed.append(parent)
        if parent is None:
            raise FileNotFoundError(2, os.strerror(2))
        for each in reversed(closed):
            assert each.parent is not None
            each.fd = os.open(each.name, _FLAGS, dir_fd=each.parent.fd)
            self._open.append(each)
        return place.fd

    def relax(self) -> None:
        """Close all descriptors where there are many. To be called where no operation is under way."""
        if len(self._open) > self._limit:
            for place in self._open:
                if place.fd >= 0:
                    os.close(place.fd)
                    place.fd = -1
            self._open.clear()

    def drop(self, place: Place) -> None:
        """Forget a place whose directory is being removed."""
        if place.fd >= 0:
            os.close(place.fd)
            place.fd = -1
        place.parent = None
