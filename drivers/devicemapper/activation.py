"""Thin devices as block devices: on demand, and only as long as somebody wants them.

A device is active from when its mounts are asked for until its volume is sealed or removed, or until nobody has had it
open, nor asked for its mounts, for ten minutes. So whoever is told how to mount it has that long to do it.

The device of a sealed volume is read-only in the kernel.

While a pool is suspended, as it is for a moment when it grows, the kernel takes no tables of thin devices (EINVAL).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from layerfs.backings.thinpool import users_of
from layerfs.drivers.devicemapper.ledger import Device
from layerfs.errors import FailedPrecondition
from layerfs.kernel import dm
from layerfs.thinpool import Pool

IDLE = 600.0
"""Seconds for which a device stays active that nobody has open."""

_PATIENCE = 1.0  # seconds: blkid and the like look at new devices for a moment
_PAUSE = 0.02


class Activation:
    """The block devices of one pool. Each method raises `OSError` but for what it says.

    Args:
        steady: gives a context in which the pool is not made larger.
    """

    def __init__(self, pool: Pool, steady: Callable[[], AbstractContextManager[None]]) -> None:
        self._pool = pool
        self._steady = steady

    def name(self, device: Device) -> str:
        """The name below ``/dev/mapper``."""
        return f"{self._pool.name}-{device.id}"

    def path(self, device: Device) -> Path:
        """Where it is, while it is active."""
        return dm.path(self.name(device))

    def is_active(self, device: Device) -> bool:
        """Whether it can be opened now, as it should be; if so, it has just been asked for."""
        found = dm.info(self.name(device))
        if found is None or not found.live or found.suspended or found.read_only != device.is_sealed:
            return False
        dm.link(self.name(device), found.number)
        return True

    def on(self, device: Device, *, read_only: bool | None = None) -> Path:
        """Make it active, read-only if it is sealed or as told, and say where. The pool's lock is held."""
        name = self.name(device)
        wanted = device.is_sealed if read_only is None else read_only
        found = dm.info(name)
        if found is not None and found.live and found.read_only == wanted:
            if found.suspended:
                dm.resume(name)
            dm.link(name, found.number)
            return dm.path(name)
        self.off(device)
        with self._steady():
            dm.activate(name, f"LAYERFS-{name}", self._pool.table(device.id, device.size), read_only=wanted)
        return dm.path(name)

    def off(self, device: Device) -> None:
        """Make it inactive. Raises `FailedPrecondition` naming who has it open."""
        while True:
            try:
                dm.remove(self.name(device))
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                if users := self.users(device):
                    what = f"the volume {device.volume!r}" if device.volume else "the empty volume"
                    raise FailedPrecondition(f"the device of {what} is in use: {users}; unmount it first") from error
            else:
                return

    def users(self, device: Device) -> str:
        """Who has it open, for people; "" where nobody has, or only for a moment."""
        name = self.name(device)
        until = time.monotonic() + _PATIENCE
        while (found := dm.info(name)) is not None and found.open_count:
            users = users_of(name, found.number)
            if "mounted" in users or time.monotonic() > until:
                return users
            time.sleep(_PAUSE)
        return ""

    def is_open(self, device: Device) -> bool:
        """Whether somebody has it open at this moment."""
        found = dm.info(self.name(device))
        return found is not None and found.open_count > 0

    def resize(self, device: Device, size: int) -> None:
        """Make it ``size`` bytes large, whatever it is used for."""
        name = self.name(device)
        with self._steady():
            dm.load(name, self._pool.table(device.id, size))
        dm.suspend(name)  # not in there: it may wait for the pool to grow
        dm.resume(name)

    def suspend(self, device: Device) -> None:
        """Hold back what is written to it, with the file system on it in order."""
        dm.suspend(self.name(device))

    def resume(self, device: Device) -> None:
        """Let it go on. Not active, or not suspended: no error."""
        found = dm.info(self.name(device))
        if found is not None and found.suspended:
            dm.resume(self.name(device))

    def sweep(self) -> None:
        """Make inactive what has been idle for long. The pool's lock is held."""
        for name in dm.devices():
            if name.startswith(f"{self._pool.name}-") and time.time() - dm.linked_at(name) > IDLE:
                try:
                    dm.remove(name)
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
