"""One operation on the pool at a time: the lock, what a killed process left, and the steps that change the pool."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerfs import mounts
from layerfs.backing import Backing
from layerfs.driver import Mount
from layerfs.drivers.devicemapper.activation import Activation
from layerfs.drivers.devicemapper.ledger import BLANK, Device, Ledger, State
from layerfs.drivers.devicemapper.volumefs import VolumeFileSystem
from layerfs.errors import Damaged, LayerfsError, OutOfSpace
from layerfs.kernel import dm
from layerfs.kernel.ioctl import io
from layerfs.kernel.libc import check as checked
from layerfs.kernel.libc import libc
from layerfs.sizes import format_size
from layerfs.thinpool import Pool, Status

_BLKDISCARD = io(0x12, 119)

_MIB = 1 << 20
_REMEDY = "remove some layers, or make it larger with `layerfs grow`"


class PoolSession:
    """A pool with its database of devices.

    Args:
        root: the driver's directory, for the database and the lock.
        backing: the one that `root` lies on.
    """

    def __init__(self, root: Path, backing: Backing, filesystem: VolumeFileSystem) -> None:
        self._lock = root / "lock"
        self._backing = backing
        self.filesystem = filesystem
        self.pool = Pool(backing.facts["pool"])
        self.ledger = Ledger(root / "devices.db")
        self.activation = Activation(self.pool, backing.held)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody else change the pool; what a killed process was doing to it is finished or undone first.

        Raises `Damaged` where the pool and the database do not belong together, or the pool has stopped.
        """
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with self.ledger.held():
                status = self.check_same()
                self._check_alive(status)
                self.extend()
                self.recover()
                if status.transaction != self.ledger.transaction:
                    self._stepped()
                yield
        finally:
            os.close(fd)

    # Steps, each with the lock held

    def snapshot(self, volume: str, origin: Device, *, size_limit: int | None = None) -> Device:
        """Make a thin device with the contents of another one; it is in the state `State.CREATING` then, and active."""
        self._write_out(origin)
        self.check_room()
        device = self.ledger.begin(
            volume,
            origin.size,
            origin=origin.id if origin.is_sealed else origin.origin,
            times_full=self.times_full if origin.is_sealed else origin.times_full,
            notes_faults=self.filesystem.notes_faults,
            size_limit=size_limit,
        )
        with self.undone(device):
            with self._still(origin):
                self.pool.snapshot(device.id, origin.id)
                self._stepped()
            self.filesystem.protect(self.activation.on(device))
            if not origin.is_sealed:
                self._protect_again(origin)
        return device

    def replace(self, device: Device, by: Device, *, sealed_at: int) -> None:
        """Have a volume be on another device from now on, sealed; its own goes when nobody has it open any more."""
        self.ledger.replace(device, by, sealed_at=sealed_at, size_limit=None)
        self._stepped()

    def blank(self, size: int) -> Device:
        """The empty file system that volumes without a parent are snapshots of; made when there is none yet."""
        if (found := self.ledger.find(BLANK)) is not None:
            return found
        self.check_room()
        device = self.ledger.begin(BLANK, size, times_full=self.times_full, notes_faults=False)
        with self.undone(device):
            self.pool.create(device.id)
            self._stepped()
            path = self.activation.on(device)
            self.filesystem.make(path)
            with self.opened(device) as fd:
                self.filesystem.settle(fd)
                os.fchmod(fd, 0o755)
            self.activation.off(device)
            self.ledger.change(device, state=State.READY, sealed_at=0)
        ready = self.ledger.find(BLANK)
        assert ready is not None
        return ready

    def limit(self, device: Device, free: int | None) -> None:
        """Leave room for ``free`` bytes in a volume, in a device that is made larger if need be."""
        self.activation.on(device)
        with self._root_kept(device) as fd:
            before = None if device.size_limit is None else self.filesystem.free(fd)
            try:
                if free is not None:
                    self.filesystem.limit(fd, None)
                    self._make_room(device, fd, free)
                self.filesystem.limit(fd, free)
            except BaseException:
                with contextlib.suppress(OSError, LayerfsError):
                    self.filesystem.limit(fd, before)
                raise

    def _make_room(self, device: Device, fd: int, free: int) -> None:
        missing = free - self.filesystem.free(fd)
        if missing > 0:
            # What the file system needs for itself grows with it.
            size = (device.size + missing + missing // 16 + 4 * _MIB) // _MIB * _MIB
            self.ledger.change(device, size=size)
            self._resize(device, size)
            self.filesystem.grow(fd, size)

    def _resize(self, device: Device, size: int) -> None:
        with self.filesystem.giving_up(self.activation.path(device)):
            self.activation.resize(device, size)

    @contextmanager
    def _root_kept(self, device: Device) -> Iterator[int]:
        """The root directory of a volume, which has the same time again afterwards, whatever happens meanwhile."""
        with self.opened(device) as fd:
            info = os.fstat(fd)
            is_new = device.state is State.CREATING
            if not is_new:
                self.ledger.change(device, state=State.LIMITING, root_mtime=info.st_mtime_ns)
            try:
                yield fd
            finally:
                os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))
                os.fsync(fd)
                if not is_new:
                    self.ledger.change(device, state=State.READY, root_mtime=None)

    def delete(self, device: Device) -> None:
        """Delete a device with all that it holds. Raises `FailedPrecondition` where it is in use, and keeps it then."""
        self.activation.off(device)
        if device.state not in (State.CREATING, State.REMOVING):
            self.ledger.condemn(device)
        # Deleting alone gives the blocks back to the pool, but not to the file system below it.
        with contextlib.suppress(OSError):
            _discard(self.activation.on(device, read_only=False), device.size)
        self.activation.off(device)
        self.pool.delete(device.id)
        self._stepped()
        self.ledger.forget(device)

    @contextmanager
    def opened(self, device: Device) -> Iterator[int]:
        """The root directory of an active device that is not sealed, writable."""
        options = ("rw", *self.filesystem.writable)
        with mounts.opened([Mount(self.filesystem.name, str(self.activation.path(device)), options)]) as fd:
            yield fd

    def recover(self) -> None:
        """Finish or undo what a killed process was doing, and delete what was replaced and is not open any more.

        What cannot be done now is left for the next time.
        """
        for device in self.ledger.unfinished():
            with contextlib.suppress(OSError, LayerfsError):
                match device.state:
                    case State.REPLACED if self.activation.is_open(device):
                        pass
                    case State.CREATING | State.REPLACED | State.REMOVING:
                        self.delete(device)
                    case State.SUSPENDED:
                        self.activation.resume(device)
                        self.ledger.change(device, state=State.READY)
                    case State.LIMITING:
                        self._settle(device)

    def _settle(self, device: Device) -> None:
        """Finish what `limit` was doing: the limit is the old or the new one, and nothing else has changed."""
        self.activation.on(device)
        self._resize(device, device.size)
        with self.opened(device) as fd:
            self.filesystem.grow(fd, device.size)
            self.filesystem.settle(fd)
            assert device.root_mtime is not None
            os.utime(fd, ns=(os.fstat(fd).st_atime_ns, device.root_mtime))
            os.fsync(fd)
        self.ledger.change(device, state=State.READY, root_mtime=None)

    # Watching

    def check_room(self) -> None:
        """Raise `OutOfSpace` where the pool is so full that a new volume could not be written to."""
        status = self.pool.status()
        least = min(max(status.total // 50, 2 * _MIB), 64 * _MIB)
        free = self._backing.space().free
        if free < least:
            raise OutOfSpace(
                f"the thin pool {self.pool.name} has only {format_size(free)} of {format_size(status.total)} left; "
                f"{_REMEDY}"
            )
        if status.metadata_total - status.metadata_used < status.metadata_total // 16:
            raise OutOfSpace(
                f"the thin pool {self.pool.name} has only "
                f"{format_size(status.metadata_total - status.metadata_used)} of {format_size(status.metadata_total)} "
                f"left for its metadata; {_REMEDY}"
            )

    @property
    def times_full(self) -> int:
        """How often writes have failed because the pool was full."""
        return self._backing.failures()

    def extend(self) -> None:
        """Have the pool grow where it is about to be full and can; where it cannot, all goes on until it is full.

        The lock need not be held. Raises `OSError` where the pool is not active any more.
        """
        self.pool.status()
        with contextlib.suppress(LayerfsError):  # there may be room for what is wanted
            self._backing.extend()

    def check_same(self) -> Status:
        """Raise `Damaged` where the pool is not the one that the database tells of; else its status.

        The lock need not be held: another process may take both further meanwhile.
        """
        before, status, noted = self.ledger.transaction, self.pool.status(), self.ledger.transaction
        if status.mode != "failed" and not before - 1 <= status.transaction <= noted:
            raise Damaged(
                f"the thin pool {self.pool.name} is at transaction {status.transaction}, the database "
                f"{str(self._lock.parent)!r} at {noted}: they are of different times, or of different stores; "
                "bring back the one that belongs to the other"
            )
        return status

    def _check_alive(self, status: Status) -> None:
        if status.mode in ("ro", "failed"):
            raise Damaged(
                f"the thin pool {self.pool.name} has stopped (mode {status.mode!r}): its metadata were full, or could "
                "not be written; unmount its layers and open the store again, which checks it"
            )

    def _stepped(self) -> None:
        self.pool.set_transaction(self.pool.status().transaction, self.ledger.transaction)

    def _write_out(self, origin: Device) -> None:
        """Have on its device what waits to be written to a volume that is mounted, before it is suspended.

        There it may find the pool full, or fill it.
        """
        if not origin.is_sealed and self.activation.is_open(origin):
            with contextlib.suppress(OSError), self.opened(origin) as fd:  # what failed is found as the volume's fault
                checked(libc.syncfs(fd))

    @contextmanager
    def _still(self, origin: Device) -> Iterator[None]:
        """Hold back what is written to a device that may be mounted; that of a sealed volume is read-only anyway."""
        if origin.is_sealed or not self.activation.is_active(origin):
            yield
            return
        self.ledger.change(origin, state=State.SUSPENDED)
        try:
            with self.filesystem.giving_up(self.activation.path(origin)):
                self.activation.suspend(origin)
            yield
        finally:
            self.activation.resume(origin)
            self.ledger.change(origin, state=State.READY)

    def _protect_again(self, origin: Device) -> None:
        """See `VolumeFileSystem.protect`; a snapshot of a device shares again what had been its own."""
        found = dm.info(self.activation.name(origin))
        if found is not None and found.open_count:  # it is not ours to write to
            self.ledger.change(origin, notes_faults=False)
        else:
            self.filesystem.protect(self.activation.on(origin))

    @contextmanager
    def undone(self, device: Device) -> Iterator[None]:
        """Delete a device again where its making fails."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError, LayerfsError):  # or else by whoever comes next
                self.delete(device)
            raise


def _discard(path: Path, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", 0, size))
    finally:
        os.close(fd)
