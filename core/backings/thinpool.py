"""A thin pool of the device-mapper, on two sparse files or on block devices.

The data lie on ``backing.img`` or the given device; the metadata on ``metadata.img`` or a device of their own. Sparse
metadata are made as large as they can become, so that the data are always full first: a pool without room for its
metadata stops for good until it has been checked.

A pool on sparse files grows by itself: whenever it is asked whether it is `ThinPool.outgrown`, and by a quarter free at
most, it becomes larger by half, as long as the file system below keeps a twentieth of its size free. A write that finds
no block waits for that, but not for longer than the kernel says (dm_thin_pool's parameter ``no_space_timeout``, a
minute). Where it cannot become larger, as on a device, writes to a full pool fail at once.

A device that was given begins with a header of one MiB that says whose it is; the pool uses what comes behind it.
`Kind.facts` has ``pool``, the name of the pool's device; devices that a driver makes of the pool begin with that name
and a hyphen.

Nothing here needs a clean end: the kernel frees the loop devices once the pool is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from layerfs import mount_table
from layerfs.backings import places
from layerfs.backings.kind import BackingSpec, Kind, Space, free_bytes, total_bytes
from layerfs.errors import Damaged, EnvironmentUnfit, FailedPrecondition, InvalidArgument, LayerfsError, refused
from layerfs.kernel import dm
from layerfs.programs import run, tool
from layerfs.thinpool import CHUNK, LARGEST_METADATA, METADATA_BLOCK, Pool, Status, pool_table

_SMALLEST = 64 * places.MIB
_SMALLEST_METADATA = 2 * places.MIB
# A pool grows when this part of its data or metadata is used, or more. For metadata the kernel has an event of its own,
# when at most a quarter of them is left.
_NEARLY_FULL, _PARTS = 3, 4

_METADATA_SHARE = 8  # bytes of data for each byte of metadata: more than one block of 4 KiB for each chunk

_CLEAN = "metadata.clean"
"""The file that is there while the pool is down as `ThinPool.down` left it, so that it need not be checked."""

_FAILURES = "pool.failures"
"""The file that counts them, see `ThinPool._count_failures`."""

_LARGEST_RESERVE = 10 << 30  # bytes that the file system below keeps, at most

_HEADER_SIZE = places.MIB
_MAGIC = b"layerfs thin pool "


class ThinPool(Kind):
    """``thinpool``."""

    files = (
        *("backing.img", "backing.img.new", "metadata.img", "metadata.img.new"),
        *(_CLEAN, _FAILURES, f"{_FAILURES}.new"),
    )

    @classmethod
    def validate(cls, spec: BackingSpec) -> None:
        places.check_size(spec.size, spec.device, spec.filesystem, _SMALLEST)
        if spec.metadata_device is not None and (spec.device is None or spec.metadata_size is not None):
            raise InvalidArgument("a metadata device goes with a device for the data, and has a size of its own")
        if spec.largest is not None and (spec.device is not None or spec.largest < (spec.size or spec.largest)):
            raise InvalidArgument("the largest size of a thin pool goes with a sparse file, and is not below its size")
        if spec.metadata_size is not None and not _SMALLEST_METADATA <= spec.metadata_size <= LARGEST_METADATA:
            raise InvalidArgument(f"the metadata of a thin pool take {_SMALLEST_METADATA} to {LARGEST_METADATA} bytes")

    def prepare(self, *, force: bool) -> BackingSpec:
        if os.geteuid() != 0:
            raise EnvironmentUnfit("making a thin pool takes block devices; run it as root")
        check_kernel()
        tool("thin_check", "thin-provisioning-tools")
        self._take_down()  # what a killed process left holds the devices
        for device in self._devices:
            places.check_unused(device)
            if not force and not self._is_ours(device):
                places.check_empty(device)
        size = self.spec.size
        if self.spec.device is None and size is None:
            size = places.default_size(self.root, self.spec.filesystem, _SMALLEST)
            size = min(size, max(self.spec.largest or size, _SMALLEST))
        return dataclasses.replace(self.spec, size=size)

    def make(self) -> None:
        self._take_down()
        for device in self._devices:
            self._write_header(device)
        if self._image is not None:
            assert self.spec.size is not None
            with places.new_image(self._image, self.spec.size):
                pass
        if self._metadata_image is not None:
            size = self.spec.metadata_size or _metadata_size(self.spec.size or _size_of(self.spec.device))
            with places.new_image(self._metadata_image, size):
                pass
        try:
            self._activate()  # the kernel makes a new pool where the metadata are zeros
        finally:
            self._take_down()

    def is_up(self) -> bool:
        with contextlib.suppress(FileNotFoundError):  # no device-mapper
            found = dm.info(self._name)
            return found is not None and found.live and not found.suspended
        return False

    def up(self) -> None:
        check_kernel()
        found = dm.info(self._name)
        if found is not None and found.live:  # suspended by a process that was killed while it made the pool larger
            self._count_failures(cleared=True)
            dm.resume(self._name)
            return
        self._take_down()
        for device in self._devices:
            if not self._is_ours(device):
                raise Damaged(f"{device!r} is not the device that was made part of the pool of {str(self.root)!r}")
        is_clean = self._clean.exists()
        self._clean.unlink(missing_ok=True)
        with places.directory(self.root) as fd:
            os.fsync(fd)  # or else it could be there again after a crash
        self._activate(check=not is_clean)

    def down(self) -> None:
        if users := list(self._users()):
            raise FailedPrecondition(f"the thin pool of {str(self.root)!r} is in use: {', '.join(users)}")
        is_clean = self._is_sound()
        self.failures()
        self._take_down()
        if is_clean:
            self._clean.touch(mode=0o600)
        for image in (self._image, self._metadata_image):
            if image is not None and image.exists():
                places.release(image)

    def enlarge(self, size: int) -> BackingSpec:
        if self._image is not None:
            places.enlarge_image(self._image, size)
            if self._metadata_image is not None and self.spec.metadata_size is None:
                wanted = max(_metadata_size(size), self._metadata_image.stat().st_size)
                places.enlarge_image(self._metadata_image, wanted)
        if self._metadata_image is not None and self._is_live():
            places.enlarge_image(self._metadata_image, self._wanted_metadata(Pool(self._name).status()))
        return self.spec if self._image is None else dataclasses.replace(self.spec, size=size)

    def grow(self) -> None:
        for image in (self._image, self._metadata_image):
            if image is not None:
                places.update_capacity(image)
        if not self._is_live():
            return  # the size is looked up when it comes up
        try:
            for name, device in ((self._data_name, self.spec.device), (self._metadata_name, self.spec.metadata_device)):
                if device is not None:
                    dm.load(name, _behind_header(device))
                    dm.suspend(name, freeze=False)
                    dm.resume(name)
            metadata, data, *_ = dm.table(self._name)[0].params.split()
            dm.load(self._name, self._table(metadata, data, _size_of(_block(data))))
            dm.suspend(self._name, freeze=False)
            try:
                self._count_failures(cleared=True)
            finally:  # the disk may be full
                dm.resume(self._name)
        except OSError as error:
            raise refused(f"growing {self._name!r}", error) from error

    def outgrown(self) -> int | None:
        """See `Kind.outgrown`: three quarters of data or metadata are used, or the table is not as it should be.

        That is so when a process was killed between two steps of growing, when there is room to grow or none any more,
        and when writes have waited in vain.
        """
        try:
            found = dm.info(self._name)
            if found is None or not found.live:
                return None
            status = Pool(self._name).status()
            waits = self._waits()
        except OSError as error:
            raise refused(f"asking the thin pool of {str(self.root)!r} for its space", error) from error
        if status.mode in ("ro", "failed"):
            return None
        size = self._size()
        larger = self._larger(size)
        is_known = self._image is None or status.total == size // CHUNK * CHUNK
        if is_known and larger > size and _is_nearly_full(status.used, status.total):
            return larger
        is_whole = (
            is_known
            and not found.suspended
            and (self._metadata_image is None or self._wanted_metadata(status) - status.metadata_total < METADATA_BLOCK)
            and waits == (larger > size)
            and not (waits and status.refuses)
        )
        return None if is_whole else size

    def failures(self) -> int:
        """See `Kind.failures`. A full pool in which all writes could wait for long enough does not count."""
        return self._count_failures()

    def erase(self) -> None:
        for device in self._devices:
            if self._is_ours(device):
                with places.opened(device, os.O_WRONLY) as fd:
                    os.pwrite(fd, bytes(2 * _HEADER_SIZE), 0)
                    os.fsync(fd)

    def space(self) -> Space:
        """See `Kind.space`; for a sparse file no more is free than the file system below has."""
        try:
            status = Pool(self._name).status()
        except OSError as error:
            raise refused(f"asking the thin pool of {str(self.root)!r} for its space", error) from error
        return Space(status.free if self._image is None else min(status.free, free_bytes(self.root)), status.total)

    def facts(self) -> dict[str, str]:
        return {"pool": self._name}

    # Names and places

    @property
    def _clean(self) -> Path:
        return self.root / _CLEAN

    @property
    def _name(self) -> str:
        return f"layerfs-{self.uuid.replace('-', '')[:12]}"

    @property
    def _data_name(self) -> str:
        return f"{self._name}.data"

    @property
    def _metadata_name(self) -> str:
        return f"{self._name}.metadata"

    @property
    def _image(self) -> Path | None:
        return None if self.spec.device else self.root / "backing.img"

    @property
    def _metadata_image(self) -> Path | None:
        return None if self.spec.metadata_device else self.root / "metadata.img"

    @property
    def _devices(self) -> list[str]:
        return [device for device in (self.spec.device, self.spec.metadata_device) if device is not None]

    # Growing

    def _size(self) -> int:
        """Bytes of the data's file; 0 for a device."""
        return 0 if self._image is None else self._image.stat().st_size

    def _larger(self, size: int) -> int:
        """What the data's file of ``size`` bytes is to have when it is nearly full: the same where there is no room."""
        if self._image is None:
            return size
        reserve = min(total_bytes(self.root) // 20, _LARGEST_RESERVE)
        most = self._image.stat().st_blocks * 512 + max(free_bytes(self.root) - reserve, 0)
        larger = min(size + size // 2, most, self.spec.largest or most) // places.MIB * places.MIB
        return larger if larger >= size + size // 32 else size  # a smaller step is not worth it

    def _wanted_metadata(self, status: Status) -> int:
        """Bytes that the file of the metadata is to have."""
        assert self._metadata_image is not None
        size = self._metadata_image.stat().st_size
        if not _is_nearly_full(status.metadata_used, size):
            return size
        return max(size, min(size + size // 2, LARGEST_METADATA) // METADATA_BLOCK * METADATA_BLOCK)

    def _table(self, metadata: str, data: str, size: int) -> list[dm.Target]:
        low_water = size - size // _PARTS * _NEARLY_FULL if self._larger(self._size()) > self._size() else None
        return pool_table(metadata, data, size, low_water=low_water)

    def _waits(self) -> bool:
        """Whether a write that finds no block waits, by the table in use."""
        return "error_if_no_space" not in dm.table(self._name)[0].params

    def _is_live(self) -> bool:
        """Whether it is up, or suspended by a process that was killed while it made the pool larger."""
        with contextlib.suppress(FileNotFoundError):  # no device-mapper
            found = dm.info(self._name)
            return found is not None and found.live
        return False

    def _count_failures(self, *, cleared: bool = False) -> int:
        """How often writes have failed since the pool was made; written down, as the kernel forgets it.

        Where writes fail at once, each event of the kernel counts: it tells of nothing else than a pool that is full.
        Where they wait, its status says it when one has waited in vain, until it is resumed: with ``cleared``, that is
        what comes next.
        """
        try:
            times, event, refused_before = map(int, (self.root / _FAILURES).read_text(encoding="ascii").split())
        except FileNotFoundError:
            times, event, refused_before = 0, 0, 0
        if not self._is_live():
            return times
        before = (times, event, refused_before)
        found = dm.info(self._name)
        assert found is not None
        if not self._waits():
            times += found.event - event if found.event >= event else found.event
            event = found.event
        elif Pool(self._name).status().refuses and not refused_before:
            times, refused_before = times + 1, 1
        if cleared:
            event, refused_before = found.event, 0
        if (times, event, refused_before) != before:
            places.write_whole(self.root / _FAILURES, f"{times} {event} {refused_before}")
        return times

    # Steps

    def _activate(self, *, check: bool = False) -> None:
        try:
            with contextlib.ExitStack() as stack:
                data = self._part(self._data_name, self._image, self.spec.device, stack)
                metadata = self._part(self._metadata_name, self._metadata_image, self.spec.metadata_device, stack)
                if check:
                    self._check(metadata)
                table = self._table(metadata, data, _size_of(data))
                dm.activate(self._name, f"LAYERFS-{self.uuid}-pool", table)
                self._count_failures(cleared=True)
        except OSError as error:
            raise refused(f"starting the thin pool of {str(self.root)!r}", error) from error

    def _part(self, name: str, image: Path | None, device: str | None, stack: contextlib.ExitStack) -> str:
        """The block device that the pool is to use: the loop device of an image, or the device without its header."""
        if device is None:
            return stack.enter_context(places.block_device(image, None))
        dm.activate(name, f"LAYERFS-{self.uuid}-{name.rpartition('.')[2]}", _behind_header(device))
        return str(dm.path(name))

    def _check(self, metadata: str) -> None:
        """Have thin_check(8) look at the metadata; a pool that says it needs that can only be used afterwards."""
        try:
            run(["thin_check", "--quiet", "--clear-needs-check-flag", metadata], "thin-provisioning-tools")
        except EnvironmentUnfit:
            raise
        except LayerfsError as error:
            raise Damaged(
                f"the metadata of the thin pool of {str(self.root)!r} are damaged: {error}; "
                "thin_repair(8) makes new ones of what can still be read"
            ) from error

    def _is_sound(self) -> bool:
        """Whether the pool is active and the kernel has found nothing wrong with it."""
        if not self.is_up():
            return False
        status = Pool(self._name).status(flush=True)
        return status.mode in ("rw", "out_of_data_space") and not status.needs_check

    def _take_down(self) -> None:
        """Remove what stands of the pool, with the thin devices that nobody uses."""
        try:
            for name in (*self._thin_devices(), self._name, self._data_name, self._metadata_name):
                dm.remove(name)
        except FileNotFoundError:  # no device-mapper, and so none of its devices
            return
        except OSError as error:
            if error.errno == errno.EBUSY:
                text = f"the thin pool of {str(self.root)!r} is in use: something has one of its devices open"
                raise FailedPrecondition(text) from error
            raise refused(f"stopping the thin pool of {str(self.root)!r}", error) from error

    def _thin_devices(self) -> list[str]:
        return [name for name in dm.devices() if name.startswith(f"{self._name}-")]

    def _users(self) -> Iterator[str]:
        """Who has thin devices open, for people."""
        with contextlib.suppress(FileNotFoundError):
            for name in self._thin_devices():
                found = dm.info(name)
                if found is not None and found.open_count:
                    yield users_of(name, found.number)

    def _is_ours(self, device: str) -> bool:
        with places.opened(device, os.O_RDONLY) as fd:
            return os.pread(fd, len(self._header), 0) == self._header

    @property
    def _header(self) -> bytes:
        return _MAGIC + self.uuid.encode()

    def _write_header(self, device: str) -> None:
        """Write the header, and zeros where metadata would be looked for."""
        with places.opened(device, os.O_WRONLY) as fd:
            os.pwrite(fd, self._header + bytes(2 * _HEADER_SIZE - len(self._header)), 0)
            os.fsync(fd)


def check_kernel() -> None:
    """Raise `EnvironmentUnfit` where the kernel has no thin pools, saying what to do."""
    if reason := missing():
        raise EnvironmentUnfit("; ".join(reason))


def missing() -> tuple[str, str] | None:
    """What the kernel lacks for thin pools and what to do about it; None where it has them."""
    guest = "run it in a guest kernel: layerfs guest -- COMMAND"
    try:
        dm.version()
        if "thin-pool" in dm.targets() or dm.loads("thin-pool"):
            return None
    except FileNotFoundError:
        return "this kernel has no device-mapper", _module("dm_mod") or guest
    except OSError as error:
        return f"the device-mapper cannot be used: {error.strerror}", "run it as root, with /dev/mapper/control at hand"
    return "this kernel's device-mapper has no thin pools", _module("dm_thin_pool") or guest


def users_of(name: str, number: int) -> str:
    """Who has the block device open: where it is mounted, as far as can be seen here."""
    device = f"{os.major(number)}:{os.minor(number)}"
    where = [repr(str(mount.target)) for mount in mount_table.read() if mount.device == device]
    return f"{name} is mounted at {', '.join(where)}" if where else f"{name} is open (a mount that is not seen here)"


def _module(name: str) -> str:
    """How to load the module, where modprobe knows it."""
    try:
        run(["modprobe", "--dry-run", "--quiet", name], "kmod")
    except LayerfsError:
        return ""
    return f"load its module: modprobe {name}"


def _metadata_size(size: int) -> int:
    wanted = min(max(size // _METADATA_SHARE, 4 * _SMALLEST_METADATA), LARGEST_METADATA)
    return wanted // places.MIB * places.MIB


def _behind_header(device: str) -> list[dm.Target]:
    sectors = (_size_of(device) - _HEADER_SIZE) // dm.SECTOR
    return [dm.Target(0, sectors, "linear", f"{device} {_HEADER_SIZE // dm.SECTOR}")]


def _is_nearly_full(used: int, total: int) -> bool:
    return used * _PARTS >= total * _NEARLY_FULL


def _block(number: str) -> str:
    """The path of the block device ``MAJOR:MINOR``."""
    major, minor = map(int, number.split(":"))
    return dm.block_name(os.makedev(major, minor))


def _size_of(device: str | None) -> int:
    assert device is not None
    with places.opened(device, os.O_RDONLY) as fd:
        return os.lseek(fd, 0, os.SEEK_END)
