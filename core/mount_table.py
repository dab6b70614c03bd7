"""What the kernel says of mounts: which there are, what lies below another, and which processes hold one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of ``/proc/self/mountinfo``, see proc_pid_mountinfo(5), with its escapes undone.

    Attributes:
        id, parent: mount IDs; the parent is the mount that this one lies on.
        device: ``major:minor`` of the file system.
        root: the directory of the file system that is shown at ``target``.
        options: of the mount; ``super_options``: of the file system.
    """

    id: int
    parent: int
    device: str
    root: str
    target: Path
    type: str
    source: str
    options: tuple[str, ...]
    super_options: tuple[str, ...]


def read() -> list[MountPoint]:
    """Every mount of this process's mount namespace, in the kernel's order (a later one covers an earlier one)."""
    with open("/proc/self/mountinfo", "rb") as file:
        return [_parsed(line) for line in file]


def at(target: Path) -> list[MountPoint]:
    """The mounts at the mount point ``target``, the one that covers the others last."""
    name = _listed(target)
    return [mount for mount in read() if mount.target == name]


def below(target: Path) -> list[Path]:
    """The mount points below ``target``, those to be taken down first in front."""
    inside = os.path.join(_listed(target), "")
    with open("/proc/self/mountinfo", "rb", buffering=0) as file:
        listing = file.readall()
    # Each removal asks, and a host with containers has many mounts: mostly there is nothing to take apart.
    if re.sub(rb"[ \t\n\\]", lambda m: b"\\%03o" % ord(m[0]), os.fsencode(inside)) not in listing:
        return []
    names = [_octal(line.split(b" ", 5)[4]) for line in listing.split(b"\n")[:-1]]
    return [Path(name) for name in reversed(names) if name.startswith(inside) and name != inside]


def mount_of(path: Path) -> int:
    """The ID of the mount that a file lies on, or that covers it."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return _mount_id(f"/proc/self/fdinfo/{fd}")
    finally:
        os.close(fd)


def holders(target: Path) -> list[str]:
    """The processes, as ``PID (command)``, that have a file, directory or mapping on the mount at ``target``."""
    found = []
    for process in _holding(target):
        with contextlib.suppress(OSError):
            found.append(f"{process.name} ({(process / 'comm').read_text().strip()})")
    return found


def daemons(target: Path) -> list[Path]:
    """The processes that serve FUSE file systems and hold the mount at ``target``."""
    return [process for process in _holding(target) if _serves(process)]


# Parts


def _listed(target: Path) -> Path:
    """The name under which the kernel lists a mount point."""
    return Path(os.path.realpath(target.parent)) / target.name


def _parsed(line: bytes) -> MountPoint:
    fields = line.rstrip(b"\n").split(b" ")
    dash = fields.index(b"-", 6)
    number, parent, device, root, target, options = fields[:6]
    filesystem, source, super_options = fields[dash + 1 : dash + 4]
    return MountPoint(
        int(number),
        int(parent),
        device.decode(),
        _octal(root),
        Path(_octal(target)),
        _octal(filesystem),
        _octal(source),
        tuple(map(_octal, options.split(b","))),
        tuple(map(_octal, super_options.split(b","))),
    )


def _octal(raw: bytes) -> str:
    """Undo the kernel's escapes: a backslash and three octal digits."""
    if b"\\" not in raw:
        return os.fsdecode(raw)
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), raw))


def _serves(process: Path) -> bool:
    with contextlib.suppress(OSError):  # it ended meanwhile
        return any(os.readlink(link) == "/dev/fuse" for link in (process / "fd").iterdir())
    return False


def _holding(target: Path) -> Iterator[Path]:
    """The processes, as their places in /proc, that hold the mount at ``target``."""
    ids = {mount.id for mount in at(target)}
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours to look at
            if _holds(Path("/proc", pid), ids):
                yield Path("/proc", pid)


def _holds(process: Path, ids: set[int]) -> bool:
    """Whether a process's working directory, root, program, files or mappings lie on one of the mounts ``ids``."""
    for info in (process / "fdinfo").iterdir():
        with contextlib.suppress(OSError):
            if _mount_id(info) in ids:
                return True
    maps = process / "map_files"
    for link in (process / "cwd", process / "root", process / "exe", *(maps.iterdir() if maps.exists() else ())):
        with contextlib.suppress(OSError):
            if mount_of(link) in ids:
                return True
    return False


def _mount_id(fdinfo: str | Path) -> int:
    with open(fdinfo, encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
