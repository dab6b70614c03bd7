"""Loop devices: a file as a block device, by the ioctls of loop(4)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_SET_CAPACITY, _CLR_FD, _GET_STATUS64, _CONFIGURE = 0x4C07, 0x4C01, 0x4C05, 0x4C0A
_CTL_GET_FREE = 0x4C82
_AUTOCLEAR, _DIRECT_IO = 4, 16

_INFO = struct.Struct("=5Q4I64s64s32s2Q")  # struct loop_info64
_CONFIG = struct.Struct(f"=2I{_INFO.size}s64x")  # struct loop_config

# Another process can take the free device that we were told of.
_TRIES = 64


def attach(file_fd: int, name: str = "", *, direct_io: bool = False) -> tuple[Path, int]:
    """Make the file a block device; its path, and a descriptor that has to stay open until it is mounted.

    The kernel frees the device by itself once nobody has it open (autoclear). ``direct_io`` goes past the page cache
    for the file where its file system can. ENOENT, ENODEV: the kernel's loop driver is missing.
    """
    flags = _AUTOCLEAR | (_DIRECT_IO if direct_io else 0)
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, os.fsencode(name)[-63:], b"", b"", 0, 0)
    config = _CONFIG.pack(file_fd, 0, info)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            path = Path(f"/dev/loop{fcntl.ioctl(control, _CTL_GET_FREE)}")
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return path, device
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no free loop device")


def find(file: Path) -> list[Path]:
    """The loop devices that stand on ``file``, whatever name they know it by."""
    info = os.stat(file)
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        path = Path("/dev", backing.parts[-3])
        try:
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # freed meanwhile
            continue
        try:
            if _backing(device) == (info.st_dev, info.st_ino):
                found.append(path)
        finally:
            os.close(device)
    return found


def set_capacity(device_fd: int) -> None:
    """Make the device as large as its file is now."""
    fcntl.ioctl(device_fd, _SET_CAPACITY)


def detach(path: Path) -> None:
    """Free a device: at once, or when its last user closes it; one that is free already is no error."""
    try:
        device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.ioctl(device, _CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        os.close(device)


def _backing(device: int) -> tuple[int, int] | None:
    """Device and inode number of the file below, None where there is none."""
    buffer = bytearray(_INFO.size)
    try:
        fcntl.ioctl(device, _GET_STATUS64, buffer)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    fields = _INFO.unpack(buffer)
    return fields[0], fields[1]
