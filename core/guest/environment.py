"""The environment variables of a guest's command: the host's, and what tells of the guest."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerfs.guest.request import Request

_KIND, _DISKS, _HOST = "LAYERFS_GUEST", "LAYERFS_GUEST_DISKS", "LAYERFS_GUEST_HOST"
_ANEW = ("TMP", "TEMP", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")


@dataclass(frozen=True)
class Here:
    """The guest that this process runs in.

    Attributes:
        kind: one of `layerfs.guest.KINDS`.
        host: system and kernel release of the host.
        disks: the devices of the further disks that were asked for.
    """

    kind: str
    host: str
    disks: tuple[Path, ...]


def here() -> Here | None:
    """The guest that this process runs in; None on a host."""
    kind = os.environ.get(_KIND)
    if not kind:
        return None
    return Here(kind, os.environ.get(_HOST, ""), tuple(map(Path, os.environ.get(_DISKS, "").split())))


def of_command(request: Request, disks: Sequence[str]) -> Mapping[str, str]:
    """What the command of ``request`` finds; ``disks`` are the devices of its further disks."""
    given = dict(os.environ if request.environment is None else request.environment)
    for name in _ANEW:
        given.pop(name, None)
    return given | {
        _KIND: request.kind,
        _DISKS: " ".join(disks),
        _HOST: f"{platform.system()} {platform.release()}",
        "DM_DISABLE_UDEV": "1",  # there is no udev that would answer libdevmapper
        "TMPDIR": "/var/tmp",  # noqa: S108 - on the scratch disk itself; /tmp is the host's with the disk over it
        "PATH": f"{given.get('PATH', os.defpath)}:{os.path.dirname(sys.executable)}:/usr/sbin:/sbin",
    }
