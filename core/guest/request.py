"""What somebody wants of a guest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from layerfs.errors import LayerfsError

KINDS = ("uml", "qemu")

_GIB = 1 << 30


class TimedOut(LayerfsError):
    """The guest took longer than it was given, and was ended; the exit code is that of timeout(1)."""

    exit_code = 124


def default_place() -> Path:
    """TMPDIR, else /var/tmp, which unlike /tmp is on a disk everywhere (hier(7))."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108 - for files that never have a name


@dataclass(frozen=True)
class Request:
    """A command and the guest that it wants.

    Attributes:
        command: the program and its arguments, found through PATH as on the host.
        kind: one of `KINDS`.
        memory: bytes.
        cpus: processors; User-Mode Linux has one.
        place: the directory that the files of its disks are in, without names.
        scratch: bytes of the disk that keeps all that the guest writes and that does not go to the host.
        disks: bytes of each further disk; the guest finds their devices in ``LAYERFS_GUEST_DISKS``, a space between.
        timeout: seconds after which the guest is ended, booting included; None for no limit.
        kernel: a kernel image other than the kind's own, with its modules where its package has them; for QEMU also
            the release of one that the host has installed.
        directory: where the command runs.
        writable: directories of the host that the command may change; nothing else of the host can be.
        environment: of the command; None for this process's own.
        progress: is told what is being prepared, where that takes long.
    """

    command: tuple[str, ...]
    kind: str = "uml"
    memory: int = 2 * _GIB
    cpus: int = 1
    place: Path = field(default_factory=default_place)
    scratch: int = 64 * _GIB
    disks: tuple[int, ...] = ()
    timeout: float | None = None
    kernel: str | None = None
    directory: Path = field(default_factory=Path.cwd)
    writable: tuple[Path, ...] = ()
    environment: Mapping[str, str] | None = None
    progress: Callable[[str], None] = lambda _what: None
