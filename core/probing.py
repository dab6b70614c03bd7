"""What a driver's `probe` asks of the host: the file system below a place, and what the kernel can mount."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

from layerfs import mount_table
from layerfs.kernel.libc import check, libc

_DIRENT = struct.Struct("=QqHB")
_DT_UNKNOWN = 0


def nearest(path: Path) -> Path:
    """``path``, or its nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def filesystem_of(path: Path) -> str:
    """The type of the file system that the existing ``path`` lies on, as ``/proc/filesystems`` names it."""
    real = Path(os.path.realpath(path))
    found = max(
        (mount for mount in enumerate(mount_table.read()) if real.is_relative_to(mount[1].target)),
        key=lambda mount: (len(mount[1].target.parts), mount[0]),
    )
    return found[1].type


def kernel_knows(filesystem: str) -> bool:
    """Whether the kernel can mount this type now, or after loading its module (which mount(2) does by itself)."""
    lines = Path("/proc/filesystems").read_text().splitlines()
    if any(line.split("\t")[-1] == filesystem for line in lines):
        return True
    program = shutil.which("modprobe", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        return False
    command = [program, "--dry-run", "--quiet", filesystem]
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 0


def tells_types(directory: Path) -> bool:
    """Whether reading the directory, which must not be empty, tells the type of each entry (d_type, xfs's ftype=1)."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        buffer = ctypes.create_string_buffer(4096)
        length = check(libc.getdents64(fd, buffer, len(buffer)))
    finally:
        os.close(fd)
    place = 0
    while place < length:
        _, _, size, kind = _DIRENT.unpack_from(buffer, place)
        if kind == _DT_UNKNOWN:
            return False
        place += size
    return True
