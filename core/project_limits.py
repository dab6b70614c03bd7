"""A size limit for a directory by project quota: each limited directory is a project of its own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerfs.errors import EnvironmentUnfit, refused
from layerfs.kernel import quota
from layerfs.volume_dirs import opened

# Numbers below are for people's own /etc/projects; the highest one means "none" to the kernel.
_FIRST, _LAST = 1 << 20, (1 << 32) - 3


def set_limit(directory: Path, size: int) -> None:
    """Limit what ``directory`` holds to ``size`` bytes; one without a project must be empty and gets one."""
    with _reported(directory), opened(directory) as fd:
        number = quota.project(fd)
        if not number:
            number = _unused(fd)
            quota.set_limit(fd, number, size)
            quota.set_project(fd, number)
        else:
            quota.set_limit(fd, number, size)


def limit_of(directory: Path) -> int | None:
    """The size limit of ``directory`` in bytes; None where it has none."""
    with _reported(directory), opened(directory) as fd:
        number = quota.project(fd)
        return (quota.usage(fd, number).limit or None) if number else None


def release(directory: Path) -> None:
    """Take the limit away, so that nothing stays of it when ``directory`` goes. No limit or directory: no error."""
    try:
        with opened(directory) as fd:
            if number := quota.project(fd):
                quota.set_limit(fd, number, 0)
    except FileNotFoundError:
        pass


def refuse(driver: str) -> EnvironmentUnfit:
    """The error for a driver whose backing cannot limit sizes."""
    return EnvironmentUnfit(
        f"the driver {driver!r} cannot limit a layer's size here: its file system enforces no project quota; "
        "use a backing that does, or leave the limit out"
    )


def _unused(fd: int) -> int:
    """A project number that nobody uses on the file system of ``fd``."""
    while True:
        number = _FIRST + secrets.randbelow(_LAST - _FIRST)
        used = quota.usage(fd, number)
        if not (used.space or used.inodes or used.limit):
            return number


@contextmanager
def _reported(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise refused(f"limiting the size of the volume {directory.name.rpartition('-')[2]!r}", error) from error
