"""The driver: thin devices and thin snapshots of one pool, each with a file system of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from layerfs.backing import Backing
from layerfs.backings import thinpool
from layerfs.driver import BackingNeed, Capability, Mount, Probe, Problem, Usage
from layerfs.drivers.devicemapper import usage
from layerfs.drivers.devicemapper.ledger import Device, State
from layerfs.drivers.devicemapper.session import PoolSession
from layerfs.drivers.devicemapper.volumefs import KINDS
from layerfs.drivers.devicemapper.watch import Watch
from layerfs.errors import (
    Damaged,
    EnvironmentUnfit,
    FailedPrecondition,
    InvalidArgument,
    LayerfsError,
    OutOfSpace,
    refused,
)
from layerfs.kernel import dm
from layerfs.kernel.libc import check as checked
from layerfs.kernel.libc import libc
from layerfs.programs import find
from layerfs.sizes import format_size, parse_size
from layerfs.snapshot import SnapshotDriver

_DEFAULT_SIZE = 64 << 30
_LARGEST_SIZE = 16 << 40

_PROGRAMS = {"thin_check": "thin-provisioning-tools", "thin_delta": "thin-provisioning-tools"}

_SWEEP_EVERY = 60.0  # seconds

_COARSE = 5  # CLOCK_REALTIME_COARSE of clock_gettime(2), which file systems take their times from


class DevicemapperDriver(SnapshotDriver):
    """Thin devices of one pool.

    Options: ``fs`` is the file system of the volumes, ``ext4`` or ``xfs``; ``size`` is what a volume without a limit
    has room for (the pool hands out space only as it is written to). Both hold for a store's whole life.

    A pool on sparse files grows by itself (see `layerfs.backings.thinpool`): at each call that makes, changes or mounts
    a volume, and, from the first volume that can be written to until `close`, whenever the kernel says that a quarter
    is left (`layerfs.drivers.devicemapper.watch`). So it does under a server for engines as long as that runs. While no
    process has the store open, nobody makes it larger: a write to the full pool waits for a minute (dm_thin_pool's
    ``no_space_timeout``), and fails then if no command has used the store meanwhile. Writes to a full pool on a device,
    or on sparse files that have reached their largest size or the reserve of the file system below, fail at once.
    """

    name = "devicemapper"
    needs = BackingNeed(("thinpool",), "layers are devices of a thin pool")
    summary = "a layer is a thin device with a file system, a child a thin snapshot of it"

    def __init__(self, root: Path, options: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(root, options)
        if unknown := sorted(options.keys() - {"fs", "size"}):
            raise InvalidArgument(f"devicemapper has the options fs and size, and no {', '.join(map(repr, unknown))}")
        kind = options.get("fs", "ext4")
        if kind not in KINDS:
            raise InvalidArgument(f"devicemapper has no file system {kind!r} for volumes; there are {', '.join(KINDS)}")
        self._size = parse_size(options["size"]) if "size" in options else _DEFAULT_SIZE
        if not KINDS[kind].smallest <= self._size <= _LARGEST_SIZE:
            least, most = format_size(KINDS[kind].smallest), format_size(_LARGEST_SIZE)
            raise InvalidArgument(f"a volume with {kind} can have a size from {least} to {most}")
        self._size = self._size >> 20 << 20
        backing = Backing.around(root)
        if backing is None or "pool" not in backing.facts:
            raise EnvironmentUnfit(f"{str(root)!r} is on no backing of kind 'thinpool'; make one")
        self._filesystem = KINDS[kind]()
        self._session = PoolSession(root, backing, self._filesystem)
        self._activation = self._session.activation
        self._ledger = self._session.ledger
        self._watch = Watch(self._session.extend)
        self._can_grow = backing.spec.device is None
        self._swept = time.monotonic()
        self._sound_at: int | None = None
        with self._reported(f"opening the volumes in {str(root)!r}"):
            self._remember(kind)

    @classmethod
    def probe(cls, root: Path) -> Probe:  # noqa: ARG003 - the pool is made on sparse files, wherever that is
        if os.geteuid() != 0:
            return Probe(False, "device-mapper devices are made by root", "run it as root")
        if lacking := thinpool.missing():
            return Probe(False, *lacking)
        for program, package in _PROGRAMS.items():
            if find(program) is None:
                return Probe(False, f"{program} is not installed", f"apt-get install {package}")
        version = ".".join(map(str, dm.targets().get("thin-pool", ())))
        return Probe(True, f"thin devices (device-mapper's target thin-pool {version}) of a pool in sparse files")

    @property
    def capabilities(self) -> Capability:
        found = Capability.NATIVE_USAGE | Capability.BLOCK_COW
        return found | Capability.SIZE_LIMIT if self._filesystem.can_limit() else found

    def create(self, volume: str, parents: Sequence[str], *, size: int | None = None) -> None:
        """See `Driver.create`. A size limit counts what is added to the parent's tree."""
        if size is not None:
            self._check_can_limit()
        with self._reported(f"making the volume {volume!r}"), self._session.locked():
            if self._ledger.find(volume) is not None:
                return
            self._begin_watch()
            self._sweep()
            origin = self._existing(parents[0]) if parents else self._session.blank(self._size)
            device = self._session.snapshot(volume, origin, size_limit=size)
            with self._session.undone(device):
                if size is not None:
                    self._session.limit(device, size)
                self._ledger.change(device, state=State.READY)

    def fork(self, volume: str, source: str, parents: Sequence[str]) -> None:  # noqa: ARG002
        with self._reported(f"copying the volume {source!r} to {volume!r}"), self._session.locked():
            if self._ledger.find(volume) is not None:
                return
            self._begin_watch()
            origin = self._existing(source)
            device = self._session.snapshot(volume, origin, size_limit=origin.size_limit)
            self._ledger.change(device, state=State.READY)

    def seal(self, volume: str, parents: Sequence[str]) -> None:  # noqa: ARG002
        """See `Driver.seal`. Of a volume that is mounted, what it holds at this moment is sealed.

        What is written to that mount afterwards is lost with it.

        Raises `OutOfSpace` or `Damaged` where writes to the volume had failed because the pool was full.
        """
        device = self._existing(volume)
        if device.is_sealed:
            return
        with self._reported(f"sealing the volume {volume!r}"):
            if not self._seal_mounted(volume):
                self._write_out(device, volume)
                with self._session.locked():
                    self._finish(device)
                    self._ledger.change(device, sealed_at=time.time_ns(), size_limit=None)
                    self._sweep()
        # What is changed in a child has a later change time than anything here, however coarse the clock is.
        tick = time.clock_gettime_ns(_COARSE)
        while time.clock_gettime_ns(_COARSE) == tick:
            time.sleep(0.0005)

    def remove(self, volume: str) -> None:
        with self._reported(f"removing the volume {volume!r}"), self._session.locked():
            device = self._ledger.find(volume)
            if device is not None:
                self._session.delete(device)
            self._sweep()

    def mounts(self, volume: str, parents: Sequence[str], *, read_only: bool = False) -> list[Mount]:  # noqa: ARG002
        """See `Driver.mounts`. The device is there for ten minutes at least, and as long as it is mounted."""
        device = self._existing(volume)
        with self._reported(f"activating the volume {volume!r}"):
            if self._activation.is_active(device):
                self._session.extend()
            else:
                with self._session.locked():
                    device = self._existing(volume)
                    self._activation.on(device)
            if not read_only:
                self._begin_watch()
        options = self._filesystem.sealed if device.is_sealed else self._filesystem.writable
        path = self._activation.path(device)
        return [Mount(self._filesystem.name, str(path), ("ro" if read_only else "rw", *options))]

    def volumes(self) -> Iterator[str]:
        return iter([device.volume for device in self._ledger.all() if device.is_volume])

    def usage(self, volume: str, parents: Sequence[str]) -> Usage:  # noqa: ARG002
        """The blocks that the volume does not share with its parent at the same place. Inodes are not counted."""
        device = self._existing(volume)
        if device.used is None:
            with self._reported(f"measuring the volume {volume!r}"), self._session.locked():
                used = self._own_bytes(device)
                if device.is_sealed:
                    self._ledger.change(device, used=used)
                return Usage(used, -1)
        return Usage(device.used, -1)

    def resize(self, volume: str, size: int) -> None:
        """See `Driver.resize`; works while the volume is mounted."""
        self._check_can_limit()
        with self._reported(f"limiting the size of the volume {volume!r}"), self._session.locked():
            device = self._existing(volume)
            if device.is_sealed:
                raise FailedPrecondition(f"the volume {volume!r} is sealed and cannot be given another size")
            self._session.limit(device, self._left(device, size))
            self._ledger.change(device, size_limit=size)

    def check(self, volume: str, parents: Sequence[str]) -> Iterator[Problem]:
        """See `Driver.check`. The pool's metadata are checked once for each change of the pool."""
        with self._reported(f"checking the volume {volume!r}"), self._session.locked():
            return iter([*self._check_pool(), *self._check_volume(volume, parents)])

    def repair(self, volume: str, parents: Sequence[str]) -> None:  # noqa: ARG002
        """See `Driver.repair`: what was lost when the pool was full stays lost, but the rest can be used again.

        Raises `OutOfSpace` while it is still full.
        """
        device = self._existing(volume)
        with self._reported(f"repairing the volume {volume!r}"), self._session.locked():
            self._activation.on(device)
            if device.is_sealed or not self._fault(device):
                return
            self._session.check_room()
            self._activation.off(device)  # nobody may use it
            path = self._activation.on(device)
            with contextlib.suppress(LayerfsError), self._session.opened(device):
                pass  # so that what the journal or log holds is in its place
            self._filesystem.mend(path)
            with self._session.opened(device) as fd:
                self._filesystem.settle(fd)
            self._ledger.change(device, times_full=self._session.times_full)

    def status(self) -> dict[str, str]:
        with self._reported("asking the thin pool"):
            status = self._session.pool.status()
        return {
            "thin pool": f"{self._session.pool.name}, {status.mode}, transaction {status.transaction}",
            "data": f"{format_size(status.used)} of {format_size(status.total)} used",
            "metadata": f"{format_size(status.metadata_used)} of {format_size(status.metadata_total)} used",
            "file system of volumes": f"{self._filesystem.name}, room for {format_size(self._size)} without a limit",
        }

    def tree_path(self, volume: str) -> Path:
        raise EnvironmentUnfit(f"the volume {volume!r} is a device and has no directory; mount it")

    def unchanged(
        self,
        volume: str,  # noqa: ARG002
        parents: Sequence[str],
    ) -> Callable[[os.stat_result, os.stat_result], bool] | None:
        """See `SnapshotDriver.unchanged`: the same inode with the same change time, which nobody can set."""
        sealed_at = self._existing(parents[0]).sealed_at
        if sealed_at is None or time.time_ns() < sealed_at:  # the clock was set back: change times mean nothing
            return None
        return lambda old, new: old.st_ino == new.st_ino and old.st_ctime_ns == new.st_ctime_ns

    def close(self) -> None:
        self._watch.close()

    # Parts

    def _begin_watch(self) -> None:
        if self._can_grow:
            self._watch.start()

    def _existing(self, volume: str) -> Device:
        device = self._ledger.find(volume)
        if device is None:
            raise Damaged(f"the volume {volume!r} does not exist; run `layerfs check`")
        return device

    def _seal_mounted(self, volume: str) -> bool:
        """Seal a snapshot in the volume's place if others have its device open; else make that active."""
        with self._session.locked():
            device = self._existing(volume)
            if not self._activation.users(device):
                self._activation.on(device)
                return False
            self._begin_watch()
            with self._blamed(device, volume):
                copy = self._session.snapshot(device.replacement, device, size_limit=device.size_limit)
            with self._session.undone(copy):
                self._check_sound(device, volume)  # by what it was before the snapshot
                self._write_out(copy, volume)
                self._finish(copy)
            self._session.replace(device, copy, sealed_at=time.time_ns())
            return True

    def _write_out(self, device: Device, volume: str) -> None:
        """Have all of an active device on disk, with nothing left to be done for the file system, or say why not."""
        with self._blamed(device, volume), self._session.opened(device) as fd:
            self._filesystem.trim(fd)
            checked(libc.syncfs(fd))
        self._check_sound(device, volume)

    @contextmanager
    def _blamed(self, device: Device, volume: str) -> Iterator[None]:
        """Blame it on a full pool if a device cannot be written out and the pool was full in the device's time."""
        try:
            yield
        except (OSError, LayerfsError) as error:
            if device.times_full != self._session.times_full:
                raise OutOfSpace(
                    f"sealing the volume {volume!r}: writing it out failed ({error}), because the thin pool "
                    f"{self._session.pool.name} is or was full; make room, then `layerfs check --repair` keeps what "
                    "there is of it, or make it anew"
                ) from error
            raise

    def _check_sound(self, device: Device, volume: str) -> None:
        """Raise `Damaged` where writes to an active device have come to grief."""
        if fault := self._fault(device):
            raise Damaged(
                f"sealing the volume {volume!r}: {fault}; make it anew, or keep what there is of it with "
                "`layerfs check --repair`"
            )

    def _finish(self, device: Device) -> None:
        """Take away what a sealed volume needs no more: its limit, and the block device that can be written to."""
        if device.size_limit is not None:
            self._session.limit(device, None)
        self._activation.off(device)

    def _fault(self, device: Device) -> str:
        """What writes to an active volume have come to grief, for people."""
        fault = self._filesystem.fault(self._activation.path(device))
        full = device.times_full != self._session.times_full
        if fault:
            return fault + (", perhaps because the thin pool was full" if full else "")
        if full and not device.notes_faults:
            return "the thin pool was full while it was writable, and what was written then may be missing"
        return ""

    def _own_bytes(self, device: Device) -> int:
        origin = device.origin
        with self._session.pool.metadata_snapshot() as metadata:
            return usage.own_bytes(metadata, origin, device.id) if origin is not None else 0

    def _left(self, device: Device, size: int) -> int:
        """The bytes that may still be added to a volume whose limit is to be ``size``."""
        if device.size_limit is None:
            left = size - self._own_bytes(device)
        else:
            self._activation.on(device)
            with self._session.opened(device) as fd:
                left = self._filesystem.free(fd) + size - device.size_limit
        if left < 0:
            text = f"the volume {device.volume!r} holds more than {format_size(size)}; remove something from it"
            raise OutOfSpace(text)
        return left

    def _check_volume(self, volume: str, parents: Sequence[str]) -> Iterator[Problem]:
        device = self._ledger.find(volume)
        if device is None:
            yield Problem(volume, f"the database of devices knows nothing of the volume {volume!r}")
            return
        for name in parents[:1]:
            parent = self._ledger.find(name)
            if parent is None or not parent.is_sealed:
                yield Problem(volume, f"its parent {name!r} is {'missing' if parent is None else 'not sealed'}")
        if not device.is_sealed:
            self._activation.on(device)
            if fault := self._fault(device):
                yield Problem(volume, fault, repairable=True)

    def _check_pool(self) -> Iterator[Problem]:
        transaction = self._session.pool.status().transaction
        if transaction == self._sound_at:
            return
        with self._session.pool.metadata_snapshot() as metadata:
            defects = usage.defects(metadata)
            there = usage.numbers(metadata)
        known = {device.id: device.volume for device in self._ledger.all()}
        if defects:
            yield Problem("", f"the metadata of the thin pool {self._session.pool.name} are damaged: {defects}")
        for number in sorted(known.keys() - there):
            yield Problem(known[number], f"the thin device {number} of the volume {known[number]!r} is missing")
        for number in sorted(there - known.keys()):
            yield Problem("", f"nobody knows the thin device {number} of the pool {self._session.pool.name}")
        if not defects and known.keys() == there:
            self._sound_at = transaction

    def _sweep(self) -> None:
        if time.monotonic() - self._swept > _SWEEP_EVERY:
            self._activation.sweep()
            self._swept = time.monotonic()

    def _check_can_limit(self) -> None:
        if Capability.SIZE_LIMIT not in self.capabilities:
            raise EnvironmentUnfit(
                f"the driver {self.name!r} cannot limit a layer's size here: the kernel's {self._filesystem.name} has "
                "no project quota; use another fs, or leave the limit out"
            )

    def _remember(self, kind: str) -> None:
        """Finish what a killed process left, and see to it that the volumes have the file system that is asked for."""
        self._session.check_same()
        self._session.extend()
        if self._ledger.fact("filesystem") is None or self._ledger.unfinished():
            with self._session.locked():
                if self._ledger.fact("filesystem") is None:
                    self._ledger.set_fact("filesystem", kind)
        if (found := self._ledger.fact("filesystem")) != kind:
            text = f"the volumes in {str(self.root)!r} have {found}, not {kind}; give the option fs={found}"
            raise InvalidArgument(text)

    @contextmanager
    def _reported(self, step: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENXIO:
                text = f"{step}: the thin pool {self._session.pool.name} is not active; open the store, which starts it"
                raise FailedPrecondition(text) from error
            raise refused(step, error) from error
