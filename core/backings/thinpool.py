"""A thin pool of the device-mapper, on two sparse files or on block devices.

The data lie on ``backing.img`` or the given device; the metadata on ``metadata.img`` or a device of their own. Sparse
metadata are made as large as they can become, so that the data are always full first: a pool without room for its
metadata stops for good until it has been checked.

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

from layerfs import mounts
from layerfs.backings import places
from layerfs.backings.kind import BackingSpec, Kind, Space, free_bytes
from layerfs.errors import Damaged, EnvironmentUnfit, FailedPrecondition, InvalidArgument, LayerfsError, refused
from layerfs.kernel import dm
from layerfs.programs import run, tool
from layerfs.thinpool import LARGEST_METADATA, Pool, pool_table

_SMALLEST = 64 * places.MIB
_SMALLEST_METADATA = 2 * places.MIB
_METADATA_SHARE = 8  # bytes of data for each byte of metadata: more than one block of 4 KiB for each chunk

_CLEAN = "metadata.clean"
"""The file that is there while the pool is down as `ThinPool.down` left it, so that it need not be checked."""

_HEADER_SIZE = places.MIB
_MAGIC = b"layerfs thin pool "


class ThinPool(Kind):
    """``thinpool``."""

    files = ("backing.img", "backing.img.new", "metadata.img", "metadata.img.new", _CLEAN)

    @classmethod
    def validate(cls, spec: BackingSpec) -> None:
        places.check_size(spec.size, spec.device, spec.filesystem, _SMALLEST)
        if spec.metadata_device is not None and (spec.device is None or spec.metadata_size is not None):
            raise InvalidArgument("a metadata device goes with a device for the data, and has a size of its own")
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
        self._take_down()
        if is_clean:
            self._clean.touch(mode=0o600)
        for image in (self._image, self._metadata_image):
            if image is not None and image.exists():
                places.release(image)

    def enlarge(self, size: int) -> BackingSpec:
        if self._image is None:
            return self.spec
        places.enlarge_image(self._image, size)
        if self._metadata_image is not None and self.spec.metadata_size is None:
            wanted = max(_metadata_size(size), self._metadata_image.stat().st_size)
            places.enlarge_image(self._metadata_image, wanted)
        return dataclasses.replace(self.spec, size=size)

    def grow(self) -> None:
        for image in (self._image, self._metadata_image):
            if image is not None:
                places.update_capacity(image)
        if not self.is_up():
            return  # the size is looked up when it comes up
        for name, device in ((self._data_name, self.spec.device), (self._metadata_name, self.spec.metadata_device)):
            if device is not None:
                _replace(name, _behind_header(device))
        metadata, data, *_ = dm.table(self._name)[0].params.split()
        _replace(self._name, pool_table(metadata, data, _size_of(_block(data))))

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

    # Steps

    def _activate(self, *, check: bool = False) -> None:
        try:
            with contextlib.ExitStack() as stack:
                data = self._part(self._data_name, self._image, self.spec.device, stack)
                metadata = self._part(self._metadata_name, self._metadata_image, self.spec.metadata_device, stack)
                if check:
                    self._check(metadata)
                table = pool_table(metadata, data, _size_of(data))
                dm.activate(self._name, f"LAYERFS-{self.uuid}-pool", table)
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
    where = [repr(str(mount.target)) for mount in mounts.table() if mount.device == device]
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


def _replace(name: str, table: list[dm.Target]) -> None:
    """Give an active device another table, without anybody noticing but by the size."""
    try:
        dm.load(name, table)
        dm.suspend(name, freeze=False)
        dm.resume(name)
    except OSError as error:
        raise refused(f"growing {name!r}", error) from error


def _block(number: str) -> str:
    """The path of the block device ``MAJOR:MINOR``."""
    major, minor = map(int, number.split(":"))
    return dm.block_name(os.makedev(major, minor))


def _size_of(device: str | None) -> int:
    assert device is not None
    with places.opened(device, os.O_RDONLY) as fd:
        return os.lseek(fd, 0, os.SEEK_END)
