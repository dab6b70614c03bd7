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
from layerfs.errors import Damaged, FailedPrecondition, LayerfsError, OutOfSpace
from layerfs.kernel import dm
from layerfs.kernel.ioctl import io
from layerfs.sizes import format_size
from layerfs.thinpool import Pool, Status

_BLKDISCARD = io(0x12, 119)
_DISCARDED_AT_ONCE = 1 << 30

_MIB = 1 << 20


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
        self.activation = Activation(self.pool)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody else change the pool; what a killed process was doing to it is finished or undone first.

        Raises `Damaged` where the pool and the database do not belong together, or the pool has stopped.
        """
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._check_alive(self.check_same())
            self._count_full()
            self.recover()
            self._stepped()
            yield
        finally:
            os.close(fd)

    # Steps, each with the lock held

    def snapshot(self, volume: str, origin: Device, *, size_limit: int | None = None) -> Device:
        """Make a thin device with the contents of another one; it is in the state `State.CREATING` then."""
        self.check_room()
        parent, times_full = (origin.id, self.times_full) if origin.is_sealed else (origin.origin, origin.times_full)
        device = self.ledger.begin(volume, origin.size, origin=parent, times_full=times_full, size_limit=size_limit)
        with self.undone(device), self._still(origin):
            self.pool.snapshot(device.id, origin.id)
            self._stepped()
        return device

    def blank(self, size: int) -> Device:
        """The empty file system that volumes without a parent are snapshots of; made when there is none yet."""
        if (found := self.ledger.find(BLANK)) is not None:
            return found
        self.check_room()
        device = self.ledger.begin(BLANK, size, times_full=self.times_full)
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
        with self.opened(device) as fd:
            if free is not None:
                self.filesystem.limit(fd, None)
                missing = free - self.filesystem.free(fd)
                if missing > 0:
                    # What the file system needs for itself grows with it.
                    size = (device.size + missing + missing // 16 + 4 * _MIB) // _MIB * _MIB
                    self.ledger.change(device, size=size)
                    self.activation.resize(device, size)
                    self.filesystem.grow(fd, size)
            self.filesystem.limit(fd, free)

    def delete(self, device: Device) -> None:
        """Delete a device with all that it holds. Raises `FailedPrecondition` where it is in use, and keeps it then."""
        self.activation.off(device)
        if device.state is State.READY:
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
        path = dm.path(self.activation.name(device))
        options = ("rw", *self.filesystem.writable)
        with mounts.opened([Mount(self.filesystem.name, str(path), options)]) as fd:
            yield fd

    def recover(self) -> None:
        """Finish or undo what a killed process was doing. A device that somebody uses is left for the next time."""
        for device in self.ledger.unfinished():
            with contextlib.suppress(FailedPrecondition):
                match device.state:
                    case State.CREATING | State.REMOVING:
                        self.delete(device)
                    case State.SUSPENDED:
                        self.activation.resume(device)
                        self.ledger.change(device, state=State.READY)
                    case State.LIMITING:
                        self.activation.off(device)  # it may have to become larger
                        self.activation.on(device)
                        with self.opened(device) as fd:
                            self.filesystem.grow(fd, device.size)
                            self.filesystem.settle(fd)
                        self.ledger.change(device, state=State.READY)

    # Watching

    def check_room(self) -> None:
        """Raise `OutOfSpace` where the pool is so full that a new volume could not be written to."""
        status = self.pool.status()
        least = min(max(status.total // 50, 2 * _MIB), 64 * _MIB)
        free = self._backing.space().free
        if free < least:
            raise OutOfSpace(
                f"the thin pool {self.pool.name} has only {format_size(free)} of {format_size(status.total)} left; "
                "remove some layers, or make the backing larger"
            )
        if status.metadata_total - status.metadata_used < status.metadata_total // 16:
            raise OutOfSpace(
                f"the thin pool {self.pool.name} has only "
                f"{format_size(status.metadata_total - status.metadata_used)} of {format_size(status.metadata_total)} "
                "left for its metadata; remove some layers, or make the backing larger"
            )

    @property
    def times_full(self) -> int:
        """How often the pool has been full."""
        return int((self.ledger.fact("full") or "0 0").split()[0])

    def is_full(self) -> bool:
        """Whether writes fail now."""
        status = self.pool.status()
        return status.mode != "rw" or status.free == 0

    def check_same(self) -> Status:
        """Raise `Damaged` where the pool is not the one that the database tells of; else its status."""
        status = self.pool.status()
        noted = self.ledger.transaction
        if status.mode != "failed" and status.transaction not in (noted, noted - 1):
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

    def _count_full(self) -> None:
        """Note how often the pool has been full; its events are counted anew each time that it comes up."""
        found = dm.info(self.pool.name)
        assert found is not None
        times, seen = map(int, (self.ledger.fact("full") or "0 0").split())
        if found.event != seen:
            times += found.event - seen if found.event > seen else found.event
            self.ledger.set_fact("full", f"{times} {found.event}")

    def _stepped(self) -> None:
        self.pool.set_transaction(self.pool.status().transaction, self.ledger.transaction)

    @contextmanager
    def _still(self, origin: Device) -> Iterator[None]:
        """Hold back what is written to a device that may be mounted; that of a sealed volume is read-only anyway."""
        if origin.is_sealed or not self.activation.is_active(origin):
            yield
            return
        self.ledger.change(origin, state=State.SUSPENDED)
        try:
            self.activation.suspend(origin)
            yield
        finally:
            self.activation.resume(origin)
            self.ledger.change(origin, state=State.READY)

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
        for start in range(0, size, _DISCARDED_AT_ONCE):
            fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", start, min(_DISCARDED_AT_ONCE, size - start)))
    finally:
        os.close(fd)
