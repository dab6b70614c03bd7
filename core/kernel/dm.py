"""Device-mapper devices, by the ioctls of <linux/dm-ioctl.h> on ``/dev/mapper/control``.

The ioctls have been stable since Linux 2.6, and what is needed of them is little. libdevmapper and dmsetup(8) would add
a process or a library with state for the whole process, and semaphores (udev cookies) that outlive a killed process and
hang the next one where no udev answers. Here udev is told by flags to keep its hands off, and the name below
``/dev/mapper`` is made by the process that makes the device.

All lengths and places are in sectors of 512 bytes. Whatever fails raises `OSError`; its number is all that the kernel
says, the reason in words is in the kernel's log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from layerfs.kernel.ioctl import iowr

SECTOR = 512

FOLDER = Path("/dev/mapper")
CONTROL = FOLDER / "control"

_VERSION, _LIST, _CREATE, _REMOVE, _SUSPEND, _STATUS = 0, 2, 3, 4, 6, 7
_LOAD, _TABLE, _LIST_TARGETS, _MESSAGE, _ARM_POLL, _TARGET_VERSION = 9, 12, 13, 14, 16, 17

_READONLY, _SUSPENDED, _STATUS_TABLE, _ACTIVE, _BUFFER_FULL = 1, 1 << 1, 1 << 4, 1 << 5, 1 << 8
_NOFLUSH, _SKIP_LOCKFS = 1 << 11, 1 << 10

# DM_UDEV_DISABLE_{DM,SUBSYSTEM,DISK,OTHER}_RULES_FLAG and DM_UDEV_PRIMARY_SOURCE_FLAG, where udev's rules look for
# them: the upper half of the event number. The lower half would be a cookie to wait for.
_UDEV = 0x4F << 16

_HEADER = struct.Struct("=3IIIIiIIIQ128s129s7x")  # struct dm_ioctl
_TARGET = struct.Struct("=QQiI16s")  # struct dm_target_spec
_INTERFACE = (4, 0, 0)

# Python lets other threads run during an ioctl only where the buffer is no larger than this.
_SMALL, _LARGE = 1024, 1 << 16


@dataclass(frozen=True, slots=True)
class Info:
    """What the kernel says of a device.

    Attributes:
        number: as in `os.stat_result.st_rdev`.
        open_count: mounts, descriptors and other devices that hold it.
        live: whether it has a table in use; one without was being made when its process was killed.
        event: counts what the target reports, such as a pool that becomes full.
    """

    number: int
    open_count: int
    suspended: bool
    read_only: bool
    live: bool
    event: int


class Target(NamedTuple):
    """One line of a table or of a status: which sectors, and what they are."""

    start: int
    length: int
    type: str
    params: str


def version() -> tuple[int, int, int]:
    """The version of the kernel's interface. `FileNotFoundError` or `OSError`: there is no device-mapper."""
    header, _ = _call(_VERSION)
    return header[0], header[1], header[2]


def targets() -> dict[str, tuple[int, int, int]]:
    """The kinds of target that are loaded, with their versions."""
    _, data = _call(_LIST_TARGETS, size=_LARGE)
    found = {}
    place = 0
    while data:
        step, *numbers = struct.unpack_from("=4I", data, place)
        found[_text(data[place + 16 :])] = (numbers[0], numbers[1], numbers[2])
        if not step:
            break
        place += step
    return found


def loads(kind: str) -> bool:
    """Whether the kernel knows this kind of target, if need be after loading its module."""
    try:
        _call(_TARGET_VERSION, kind)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTTY):
            return False
        raise
    return True


def devices() -> list[str]:
    """The names of all devices."""
    _, data = _call(_LIST, size=_LARGE)
    found = []
    place = 0
    while len(data) >= place + 12:
        number, step = struct.unpack_from("=QI", data, place)
        if number:
            found.append(_text(data[place + 12 :]))
        if not step:
            break
        place += step
    return found


def info(name: str) -> Info | None:
    """What there is to know of a device; None where there is none of that name."""
    try:
        header, _ = _call(_STATUS, name)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    return _info(header)


def activate(name: str, uuid: str, table: Sequence[Target], *, read_only: bool = False) -> Info:
    """Make a device of this table, and its name below ``/dev/mapper``. One that is half made is made anew.

    EBUSY: there is a whole one already, or one with this ``uuid`` (at most 128 characters) under another name.
    """
    if (found := info(name)) is not None and not found.live and not found.open_count:
        remove(name)
    _call(_CREATE, name, uuid=uuid)
    try:
        load(name, table, read_only=read_only)
        resume(name)
        made = info(name)
        if made is None:
            raise OSError(errno.ENXIO, "the device vanished while it was made")
        link(name, made.number)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(name)
        raise
    return made


def load(name: str, table: Sequence[Target], *, read_only: bool = False) -> None:
    """Give a device a new table, which counts from the next `resume` on."""
    specs = b"".join(_spec(target) for target in table)
    _call(_LOAD, name, flags=_READONLY if read_only else 0, data=specs, count=len(table))


def suspend(name: str, *, freeze: bool = True) -> None:
    """Let what is under way end and hold back what comes, until `resume`; a file system on it is frozen first."""
    _call(_SUSPEND, name, flags=_SUSPENDED | (0 if freeze else _SKIP_LOCKFS))


def resume(name: str) -> None:
    """Bring a loaded table into use, and let the device go on. One that is not suspended: no error."""
    _call(_SUSPEND, name, udev=True)


def remove(name: str) -> None:
    """Take a device away. One that is gone is no error; EBUSY: something has it open, and it stays as it is."""
    try:
        _call(_REMOVE, name, udev=True)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    (FOLDER / name).unlink(missing_ok=True)


def table(name: str) -> list[Target]:
    """The table in use."""
    return _lines(name, _STATUS_TABLE)


def status(name: str, *, flush: bool = True) -> list[Target]:
    """What the targets say of themselves; without ``flush``, as it was when they last wrote it down."""
    return _lines(name, 0 if flush else _NOFLUSH)


def message(name: str, text: str) -> None:
    """Tell the device's first target to do something."""
    _call(_MESSAGE, name, data=struct.pack("=Q", 0) + text.encode() + b"\0")


def path(name: str) -> Path:
    """Where an active device can be opened and mounted from."""
    return FOLDER / name


def link(name: str, number: int) -> None:
    """Make the name of an active device, as udev would: a link to the node that the kernel made, or else a node.

    One that is right is only given the present time.
    """
    place = FOLDER / name
    node = Path(f"/dev/dm-{os.minor(number)}")
    try:
        if os.stat(place).st_rdev == number:
            os.utime(place, follow_symlinks=False)
            return
    except FileNotFoundError:
        FOLDER.mkdir(mode=0o755, exist_ok=True)
    place.unlink(missing_ok=True)  # what a killed process left leads elsewhere
    with contextlib.suppress(FileExistsError):  # another process was faster
        if node.exists():
            place.symlink_to(f"../{node.name}")
        else:
            os.mknod(place, stat.S_IFBLK | 0o600, number)


def linked_at(name: str) -> float:
    """When `link` was last called for a device, in seconds since 1970; 0 where it has no name."""
    try:
        return os.lstat(FOLDER / name).st_mtime
    except FileNotFoundError:
        return 0.0


def block_name(number: int) -> str:
    """The path of a block device of this number, as the kernel named it."""
    place = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/uevent"
    lines = Path(place).read_text(encoding="ascii").splitlines()
    return "/dev/" + next(line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME="))


class Events:
    """Becomes readable, for poll(2), when a device has an event that came after the last `arm`. Linux 4.13.

    Of which device, it does not say. `FileNotFoundError` or `OSError`: there is no device-mapper.
    """

    def __init__(self) -> None:
        with _control() as control:
            self._fd = os.dup(control)

    def fileno(self) -> int:
        return self._fd

    def arm(self) -> None:
        """Wait for what comes from now on."""
        head = (*_INTERFACE, _HEADER.size, _HEADER.size, 0, 0, 0, 0, 0, 0, b"", b"")
        fcntl.ioctl(self._fd, iowr(0xFD, _ARM_POLL, _HEADER.size), bytearray(_HEADER.pack(*head)))

    def close(self) -> None:
        os.close(self._fd)


# The ioctl


def _call(
    command: int,
    name: str = "",
    *,
    uuid: str = "",
    flags: int = 0,
    data: bytes = b"",
    count: int = 0,
    udev: bool = False,
    size: int = _SMALL,
) -> tuple[tuple[int, ...], bytes]:
    """One ioctl; the header of the answer, and what comes with it."""
    size = max(size, -(-(_HEADER.size + len(data)) // 8) * 8)
    event = _UDEV if udev else 0
    with _control() as control:
        while True:
            head = (*_INTERFACE, size, _HEADER.size, count, 0, flags, event, 0, 0, name.encode(), uuid.encode())
            buffer = bytearray(size)
            _HEADER.pack_into(buffer, 0, *head)
            buffer[_HEADER.size : _HEADER.size + len(data)] = data
            fcntl.ioctl(control, iowr(0xFD, command, _HEADER.size), buffer)
            header = _HEADER.unpack_from(buffer)
            if not header[7] & _BUFFER_FULL:
                return header, bytes(buffer[header[4] : header[3]])
            size *= 4


@contextlib.contextmanager
def _control() -> Iterator[int]:
    try:
        fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENXIO):  # no node, or one of another kernel
            raise
        _make_control()
        fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _make_control() -> None:
    """Make the control node, which neither devtmpfs nor udev did. `FileNotFoundError`: no device-mapper."""
    for line in Path("/proc/misc").read_text(encoding="ascii").splitlines():
        minor, _, driver = line.strip().partition(" ")
        if driver == "device-mapper":
            FOLDER.mkdir(mode=0o755, exist_ok=True)
            CONTROL.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mknod(CONTROL, stat.S_IFCHR | 0o600, os.makedev(10, int(minor)))
            return
    raise FileNotFoundError(errno.ENOENT, "the kernel has no device-mapper", str(CONTROL))


def _info(header: tuple[int, ...]) -> Info:
    open_count, flags, event, number = header[6], header[7], header[8], header[10]
    return Info(
        number,
        open_count,
        suspended=bool(flags & _SUSPENDED),
        read_only=bool(flags & _READONLY),
        live=bool(flags & _ACTIVE),
        event=event,
    )


# Tables and names


def _spec(target: Target) -> bytes:
    params = target.params.encode() + b"\0"
    params += bytes(-len(params) % 8)
    size = _TARGET.size + len(params)
    return _TARGET.pack(target.start, target.length, 0, size, target.type.encode()) + params


def _lines(name: str, flags: int) -> list[Target]:
    header, data = _call(_TABLE, name, flags=flags, size=_LARGE)
    found = []
    place = 0
    for _ in range(header[5]):
        start, length, _, step, kind = _TARGET.unpack_from(data, place)
        found.append(Target(start, length, _text(kind), _text(data[place + _TARGET.size :])))
        place = step  # here counted from the first one
    return found


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode(errors="replace")
