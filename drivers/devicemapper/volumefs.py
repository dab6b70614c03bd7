"""The file systems that a volume can have: how each is made, mounted, limited, grown, and asked whether it is well.

Snapshots carry the UUID of what they are snapshots of: ext4 does not mind, xfs is told not to (``nouuid``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from layerfs.errors import OutOfSpace
from layerfs.kernel import mountapi, quota
from layerfs.kernel.ioctl import io, ior, iow, iowr
from layerfs.programs import run
from layerfs.sizes import format_size

_MIB = 1 << 20
_SMALL_JOURNAL = 512 << 30
"""Bytes of a device up to which a small journal will do."""

_FITRIM = iowr(0x58, 121, 24)
_LEAST_TRIMMED = 64 << 10  # what the pool can take back


class VolumeFileSystem(ABC):
    """One kind; ``fd`` is always a directory descriptor of a volume's root, mounted writable.

    What fails raises `OSError`, or what it says.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    smallest: ClassVar[int]
    """Bytes of the smallest device."""
    writable: tuple[str, ...]
    """Options for a mount of a volume that is not sealed."""
    sealed: tuple[str, ...]
    """Options for a mount of a sealed volume, whose device is read-only."""
    notes_faults: ClassVar[bool]
    """Whether it is on disk when a write failed after the process that made it was told that all is well."""

    @abstractmethod
    def make(self, device: Path) -> None:
        """Make an empty file system. Raises `LayerfsError`."""

    @abstractmethod
    def settle(self, fd: int) -> None:
        """Make the root directory of a new file system empty; finish what `limit` was doing when it was killed."""

    def protect(self, device: Path) -> None:  # noqa: B027
        """Have the places be the device's own, not shared, that a failed write is noted at, so that this cannot fail.

        The device is not mounted; what it holds does not change.
        """

    @abstractmethod
    def can_limit(self) -> bool:
        """Whether `limit` works on this kernel."""

    @abstractmethod
    def limit(self, fd: int, free: int | None) -> None:
        """Let no more than ``free`` bytes be added to the tree; None: as many as the device has room for.

        Raises `OutOfSpace` where it has not that much room.
        """

    @abstractmethod
    def grow(self, fd: int, size: int) -> None:
        """Use all of a device of ``size`` bytes."""

    @abstractmethod
    def fault(self, device: Path) -> str:
        """What the file system, which is not mounted, has noted about a write that failed; "" where all is well."""

    @abstractmethod
    def mend(self, device: Path) -> None:
        """Put the file system, which is not mounted, in order, so that there is no `fault`. Raises `LayerfsError`."""

    @contextlib.contextmanager
    def giving_up(self, device: Path) -> Iterator[None]:  # noqa: ARG002
        """Meanwhile, fail where the device takes no writes, rather than try again for ever, as suspending it would."""
        yield

    def free(self, fd: int) -> int:
        """Bytes that can be added to the tree."""
        info = os.fstatvfs(fd)
        return info.f_bavail * info.f_frsize

    def trim(self, fd: int) -> None:
        """Give back to the pool what no file uses."""
        with contextlib.suppress(OSError):  # it goes back when the volume is removed, if not now
            fcntl.ioctl(fd, _FITRIM, struct.pack("=QQQ", 0, (1 << 64) - 1, _LEAST_TRIMMED))


class Ext4(VolumeFileSystem):
    """ext4, laid out so that snapshots share most: bitmaps and inode tables together in front, a small journal.

    A write that fails for want of space in the pool stops the file system and is noted on disk: without these options
    it would lose data that was to be written later, and say so to nobody (``data_err`` works only with
    ``dioread_lock`` before Linux 6.13).

    There is no quota that root has to respect. What a size limit takes away is held by inode 5, the boot loader's,
    which has no name (``EXT4_IOC_SWAP_BOOT``). With ``metadata_csum`` e2fsck would not recognise what it holds there.
    """

    name = "ext4"
    package = "e2fsprogs"
    smallest = 16 * _MIB
    writable = ("discard", "noinit_itable", "errors=remount-ro", "data_err=abort", "dioread_lock")
    sealed = ()
    notes_faults = True

    _RESIZE, _SWAP_BOOT = iow(0x66, 16, 8), io(0x66, 17)
    _RESERVE = b".layerfs-reserve-1d8f42a07c"
    _SUPERBLOCK = struct.Struct("<1024x58xH")  # as far as s_state
    _HAS_ERRORS = 2
    _BLOCK = 4096
    _JOURNAL = struct.Struct("<1024x268xHHHHIIHHI")  # as far as the first extent of s_jnl_blocks
    _EXTENTS = 0xF30A

    def make(self, device: Path) -> None:
        with open(device, "rb") as file:
            blocks = file.seek(0, os.SEEK_END) // self._BLOCK
        # Growing is a transaction of all blocks reserved for group descriptors; it may take a quarter of the journal.
        journal = 8 if blocks <= _SMALL_JOURNAL // self._BLOCK else 64
        layout = ["-m", "0", "-G", "512", "-J", f"size={journal}", "-O", "^metadata_csum,uninit_bg", "-e", "remount-ro"]
        # What is lazy here is never done later: unused blocks of a thin device read as zeros.
        extended = f"nodiscard,lazy_itable_init=1,lazy_journal_init=1,resize={4 * blocks}"
        run(["mkfs.ext4", "-q", "-F", "-b", str(self._BLOCK), *layout, "-E", extended, str(device)], self.package)

    def settle(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # it is not there, or e2fsck put something into it
            os.rmdir("lost+found", dir_fd=fd)
        with contextlib.suppress(FileNotFoundError):
            self._put_back(fd)

    def protect(self, device: Path) -> None:
        """See `VolumeFileSystem.protect`: the super block, and that of the journal."""
        with open(device, "r+b", buffering=0) as file:
            first = os.pread(file.fileno(), self._BLOCK, 0)
            magic, _, _, depth, _, _, _, high, low = self._JOURNAL.unpack_from(first)
            places = [0]
            if magic == self._EXTENTS and not depth:
                places.append((high << 32 | low) * self._BLOCK)
            for place in places:
                os.pwrite(file.fileno(), os.pread(file.fileno(), self._BLOCK, place), place)
            os.fsync(file.fileno())

    def can_limit(self) -> bool:
        return True

    def limit(self, fd: int, free: int | None) -> None:
        self._put_back(fd, create=True, free=free)

    def grow(self, fd: int, size: int) -> None:
        # Without init_itable, which is to leave it for later, the kernel would write zeros to all new inode tables now.
        _reconfigure(fd, "init_itable")
        try:
            fcntl.ioctl(fd, self._RESIZE, struct.pack("=Q", size // self._BLOCK))
        finally:
            _reconfigure(fd, "noinit_itable")

    def fault(self, device: Path) -> str:
        with open(device, "rb") as file:
            (state,) = self._SUPERBLOCK.unpack(file.read(self._SUPERBLOCK.size))
        return "the file system stopped at an error" if state & self._HAS_ERRORS else ""

    def mend(self, device: Path) -> None:
        run(["e2fsck", "-f", "-y", str(device)], self.package)

    def _put_back(self, fd: int, *, create: bool = False, free: int | None = None) -> None:
        """Take what is reserved out of inode 5, change it so that ``free`` bytes are left, and put it back."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        file = os.open(self._RESERVE, flags, 0o600, dir_fd=fd)
        try:
            if create and not os.fstat(file).st_blocks:
                fcntl.ioctl(file, self._SWAP_BOOT)
            if create:
                self._reserve(file, free)
            if os.fstat(file).st_blocks:
                fcntl.ioctl(file, self._SWAP_BOOT)
        finally:
            os.close(file)
            os.unlink(self._RESERVE, dir_fd=fd)

    def _reserve(self, file: int, free: int | None) -> None:
        if free is None:
            os.ftruncate(file, 0)
            return
        held, left = os.fstat(file).st_size, self.free(file)
        if (size := held + left - free) < 0:
            raise OutOfSpace(f"the file system has room for {format_size(held + left)}, not for {format_size(free)}")
        if size < held:
            os.ftruncate(file, size)
        elif size > held:
            os.posix_fallocate(file, held, size - held)


class Xfs(VolumeFileSystem):
    """xfs; a size limit is a project quota of the whole tree, which root has to respect too."""

    name = "xfs"
    package = "xfsprogs"
    smallest = 512 * _MIB
    writable: tuple[str, ...] = ("discard", "nouuid", "prjquota")
    sealed = ("nouuid", "norecovery")
    notes_faults = False

    _GEOMETRY, _GROW = ior(0x58, 100, 112), iow(0x58, 110, 16)
    _PROJECT = 1

    def __init__(self) -> None:
        if not self.can_limit():
            self.writable = tuple(option for option in self.writable if option != "prjquota")

    def make(self, device: Path) -> None:
        run(["mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1", "-d", "noalign", str(device)], self.package)

    def settle(self, fd: int) -> None:
        if self.can_limit() and quota.project(fd) != self._PROJECT:
            quota.set_project(fd, self._PROJECT)

    @contextlib.contextmanager
    def giving_up(self, device: Path) -> Iterator[None]:
        """See `VolumeFileSystem.giving_up`; xfs stops then, which unmounting it mends.

        https://docs.kernel.org/admin-guide/xfs.html, Error handling: without this, metadata are written again without
        end, and what suspends the device waits for them.
        """
        before = []
        for path in Path(f"/sys/fs/xfs/dm-{os.minor(device.stat().st_rdev)}/error/metadata").glob("*/max_retries"):
            with contextlib.suppress(OSError):  # where /sys is read-only
                before.append((path, path.read_text()))
                path.write_text("0")
        try:
            yield
        finally:
            for path, text in before:
                with contextlib.suppress(OSError):  # unmounted meanwhile
                    path.write_text(text)

    def can_limit(self) -> bool:
        return os.path.exists("/proc/fs/xfs/xqm")

    def limit(self, fd: int, free: int | None) -> None:
        quota.set_limit(fd, self._PROJECT, 0)
        if free is not None:
            if (left := self.free(fd)) < free:
                raise OutOfSpace(f"the file system has room for {format_size(left)}, not for {format_size(free)}")
            quota.set_limit(fd, self._PROJECT, quota.usage(fd, self._PROJECT).space + free)

    def grow(self, fd: int, size: int) -> None:
        geometry = bytearray(112)
        fcntl.ioctl(fd, self._GEOMETRY, geometry)
        block, *_, most_inodes = struct.unpack_from("=8I", geometry)
        fcntl.ioctl(fd, self._GROW, struct.pack("=QI4x", size // block, most_inodes))

    def fault(self, device: Path) -> str:  # noqa: ARG002 - xfs notes nothing of the kind on disk
        return ""

    def mend(self, device: Path) -> None:
        run(["xfs_repair", str(device)], self.package)


KINDS: dict[str, type[VolumeFileSystem]] = {"ext4": Ext4, "xfs": Xfs}


def _reconfigure(fd: int, option: str) -> None:
    """Set an option of the file system that ``fd`` is on, as ``mount -o remount`` does."""
    context = mountapi.fspick(fd)
    try:
        mountapi.fsconfig_flag(context, option)
        mountapi.fsconfig_reconfigure(context)
    finally:
        os.close(context)
