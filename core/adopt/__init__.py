"""Images out of other programs' own stores, taken from the files that they lie in; nothing is written there.

Docker and containers/storage (podman, buildah, CRI-O) keep a layer as a directory, and beside it what else its archive
had, as tar-split records it: together they give the archive's bytes again, which the diff ID proves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from layerfs.adopt import containers_storage, docker
from layerfs.adopt.files import Files
from layerfs.errors import InvalidArgument, NotFound, refused
from layerfs.sourceimage import Candidate

_FINDERS: Final[dict[str, Callable[[Files], list[Candidate]]]] = {
    "containers-storage": containers_storage.find,
    "docker": docker.find,
}
KINDS: Final = tuple(_FINDERS)
"""Whose stores can be read."""


@contextlib.contextmanager
def opened(kind: str, root: Path) -> Iterator[list[Candidate]]:
    """The images of another program's store, readable within the context.

    Args:
        kind: one of `KINDS`.
        root: the program's data directory, like ``/var/lib/docker`` or ``/var/lib/containers/storage``.

    Raises `InvalidArgument` (no such kind, or nothing of the kind in ``root``), `NotFound`, `BadLayer`.
    """
    if kind not in _FINDERS:
        raise InvalidArgument(f"images cannot be taken from {kind!r}; the kinds are {' and '.join(KINDS)}")
    try:
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"{root} does not exist") from None
    except OSError as error:
        raise refused(f"opening {str(root)!r}", error) from error
    try:
        yield _FINDERS[kind](Files(fd, str(root)))
    finally:
        os.close(fd)
