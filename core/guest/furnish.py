"""Makes the host's file tree a place to work in, as the first thing in a guest.

The new root is an overlay: below it the host's tree, which cannot be changed, above it the guest's scratch disk. What
goes to the host is bound into it, and what a running system has is mounted over it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerfs.guest.sandbox import PRIVATE
from layerfs.kernel.libc import check, libc
from layerfs.kernel.mountapi import MNT_DETACH, MS_BIND, MS_NOSUID, MS_RDONLY, mount, umount

_STAGE = PRIVATE / "stage"
_SCRATCH, _ROOT = _STAGE / "scratch", _STAGE / "root"
_OLD = Path("/.layerfs-host")  # the tree without the disk over it, while the new one is furnished

# Directories of the scratch disk itself: an overlay's upper directory cannot be on an overlay.
_OWN = (("/var/tmp", 0o1777), ("/var/lib/layerfs", 0o700))  # noqa: S108

_SYSTEM = (
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("cgroup2", "/sys/fs/cgroup", ""),
    ("devtmpfs", "/dev", ""),
    ("devpts", "/dev/pts", "ptmxmode=666"),
    ("mqueue", "/dev/mqueue", ""),
    ("tmpfs", "/dev/shm", "mode=1777"),  # noqa: S108
    ("tmpfs", "/run", "mode=755"),
    ("tmpfs", "/run/lock", "mode=1777"),
)
_LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
)
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40


def furnish(job: Mapping[str, Any]) -> None:
    """Make the job's tree the root of this process and all that it starts."""
    _STAGE.mkdir()
    mount("tmpfs", str(_STAGE), "tmpfs")
    with contextlib.suppress(OSError):  # EBUSY: the kernel has done it itself
        mount("devtmpfs", "/dev", "devtmpfs")
    _load(job["modules"], ["overlay", "ext4", *job["drivers"]])
    _SCRATCH.mkdir()
    mount(job["devices"]["scratch"], str(_SCRATCH), "ext4")
    _enter(_overlay(job["roots"], 0 if job["trusted"] else MS_NOSUID))
    hidden = {path: os.open(path, os.O_PATH) for path in filter(_is_covered, job["kept"])}
    for kind, place, options in _SYSTEM:
        with contextlib.suppress(OSError):  # a small kernel may lack some of them
            os.makedirs(place, exist_ok=True)
            mount(kind, place, kind, 0, options.encode())
    for link, target in _LINKS:
        with contextlib.suppress(FileExistsError):
            os.symlink(target, link)
    if job["modules"]:
        _bind(job["modules"], "/lib/modules")
        _make_nodes(Path("/lib/modules", os.uname().release, "modules.devname"))
    for place, mode in _OWN:
        own = _SCRATCH / place.strip("/").replace("/", "-")
        os.mkdir(f"{_OLD}{own}")
        os.chmod(f"{_OLD}{own}", mode)
        _bind(str(own), place)
    for path in sorted({*job["writable"], *hidden}):  # parents first
        if path in job["writable"]:
            _bind(path, path)
        else:
            os.makedirs(path, exist_ok=True)
            mount(f"/proc/self/fd/{hidden[path]}", path, "", MS_BIND)
    for descriptor in hidden.values():
        os.close(descriptor)
    umount(_OLD, MNT_DETACH)
    _OLD.rmdir()
    socket.sethostname(job["name"])
    _raise_loopback()


def _load(modules: str | None, names: Sequence[str]) -> None:
    """Load modules while ``/lib/modules`` is still the host's. What cannot be loaded may be built in."""
    if modules is None:
        return
    (_STAGE / "lib").mkdir()
    (_STAGE / "lib/modules").symlink_to(modules)
    command = ["modprobe", "--dirname", str(_STAGE), "--all", "--quiet", *names]
    subprocess.run(command, env={"PATH": f"{os.defpath}:/usr/sbin:/sbin"}, check=False)


def _overlay(roots: Sequence[Mapping[str, Any]], flags: int) -> Path:
    """The host's tree with the scratch disk over it."""
    lowers = []
    for number, root in enumerate(roots):
        place = _STAGE / f"lower{number}"
        place.mkdir()
        mount(root["source"], str(place), root["type"], MS_RDONLY, ",".join(root["options"]).encode())
        lowers.append(str(place))
    for place in (_SCRATCH / "upper", _SCRATCH / "work", _ROOT):
        place.mkdir()
    options = f"lowerdir={':'.join(lowers) or '/'},upperdir={_SCRATCH}/upper,workdir={_SCRATCH}/work"
    mount("overlay", str(_ROOT), "overlay", flags, options.encode())
    return _ROOT


def _enter(root: Path) -> None:
    """Change to a new root and have the old one at `_OLD`. A chroot(2) would forbid user namespaces in it."""
    os.mkdir(f"{root}{_OLD}", 0o700)
    os.chdir(root)
    check(libc.pivot_root(b".", os.fsencode(f".{_OLD}")))
    os.chdir("/")


def _bind(path: str, place: str) -> None:
    """Show a directory of the old root at ``place``."""
    os.makedirs(place, exist_ok=True)
    mount(f"{_OLD}{path}", place, "", MS_BIND)


def _is_covered(path: str) -> bool:
    """Whether something else is mounted over a path of the host."""
    return any(Path(path).is_relative_to(place) for place in (*(own for own, _ in _OWN), "/run", "/dev"))


def _make_nodes(table: Path) -> None:
    """Make the device nodes that load their modules when they are opened, as udev does from modules.devname."""
    for line in table.read_text().splitlines() if table.exists() else ():
        if line.startswith("#"):
            continue
        _, name, device = line.split()
        kind = 0o020000 if device[0] == "c" else 0o060000
        major, minor = map(int, device[1:].split(":"))
        node = Path("/dev", name)
        node.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mknod(node, kind | 0o600, os.makedev(major, minor))
    with contextlib.suppress(FileNotFoundError):
        os.chmod("/dev/fuse", 0o666)  # noqa: S103 - as udev has it: FUSE is for all users


def _raise_loopback() -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP | _IFF_RUNNING))
