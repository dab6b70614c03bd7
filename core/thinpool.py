"""Thin pools: devices that take their blocks from a common pool as they are written to, and share them with snapshots.

A pool is a device-mapper device over a data device and a metadata device (the kernel's
admin-guide/device-mapper/thin-provisioning.rst). Its thin devices are numbers below 2^24; each becomes a block device
only while it is active. Every message is on disk when it returns. Failures raise `OSError`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from layerfs.kernel import dm

CHUNK = 64 << 10
"""Bytes in which a pool hands out space: the smallest that there is, which a snapshot copies least with."""

METADATA_BLOCK = 4096

LARGEST_METADATA = 255 * (1 << 14) * METADATA_BLOCK
"""Bytes of a metadata device that the kernel uses, at most."""

LAST_ID = (1 << 24) - 1


@dataclass(frozen=True, slots=True)
class Status:
    """How a pool is.

    Attributes:
        transaction: the number that `Pool.set_transaction` last set.
        used, total: bytes of data; metadata_used, metadata_total: bytes of metadata.
        mode: ``rw``; ``out_of_data_space``, in which every write to a new block waits or fails; ``ro`` after the
            metadata became full or could not be written; ``failed`` when even reading is impossible.
        needs_check: the metadata have to be checked while the pool is down.
        refuses: a write that finds no block fails at once. One that may wait by the pool's table has this set once it
            has waited for too long (dm_thin_pool's parameter ``no_space_timeout``), until the pool is resumed.
    """

    transaction: int
    used: int
    total: int
    metadata_used: int
    metadata_total: int
    mode: str
    needs_check: bool = False
    refuses: bool = True

    @property
    def free(self) -> int:
        """Bytes of data that nobody uses."""
        return self.total - self.used


class Pool:
    """An active pool.

    Args:
        name: of its device.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def status(self, *, flush: bool = False) -> Status:
        """How the pool is; with ``flush``, after writing down what it has handed out."""
        [line] = dm.status(self.name, flush=flush)
        if line.params.strip() in ("Fail", "Error"):
            return Status(0, 0, 0, 0, 0, "failed", needs_check=True)
        transaction, metadata, data, _, mode, *rest = line.params.split()
        used, total = map(int, data.split("/"))
        metadata_used, metadata_total = map(int, metadata.split("/"))
        return Status(
            int(transaction),
            used * CHUNK,
            total * CHUNK,
            metadata_used * METADATA_BLOCK,
            metadata_total * METADATA_BLOCK,
            mode,
            needs_check="needs_check" in rest,
            refuses="error_if_no_space" in rest,
        )

    def create(self, number: int) -> None:
        """Make an empty thin device. EEXIST: there is one of that number."""
        dm.message(self.name, f"create_thin {number}")

    def snapshot(self, number: int, origin: int) -> None:
        """Make a thin device with the contents of ``origin``, which must not be written to meanwhile."""
        dm.message(self.name, f"create_snap {number} {origin}")

    def delete(self, number: int) -> None:
        """Delete an inactive thin device; one that is not there is no error."""
        try:
            dm.message(self.name, f"delete {number}")
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise

    def set_transaction(self, old: int, new: int) -> None:
        """Give the pool another transaction number. EINVAL: the present one is not ``old``."""
        if old != new:
            dm.message(self.name, f"set_transaction_id {old} {new}")

    def table(self, number: int, size: int) -> list[dm.Target]:
        """The table that makes a thin device of ``size`` bytes a block device."""
        return [dm.Target(0, size // dm.SECTOR, "thin", f"{dm.path(self.name)} {number}")]

    @contextmanager
    def metadata_snapshot(self) -> Iterator[str]:
        """Hold the metadata as they are now, for tools to read; the path of the metadata device."""
        try:
            dm.message(self.name, "reserve_metadata_snap")
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            dm.message(self.name, "release_metadata_snap")  # a killed process's
            dm.message(self.name, "reserve_metadata_snap")
        try:
            yield self.metadata_device()
        finally:
            dm.message(self.name, "release_metadata_snap")

    def metadata_device(self) -> str:
        """The path of the block device that the pool keeps its metadata on."""
        major, minor = dm.table(self.name)[0].params.split()[0].split(":")
        return dm.block_name(os.makedev(int(major), int(minor)))


def pool_table(metadata: str, data: str, size: int, *, low_water: int | None = None) -> list[dm.Target]:
    """The table of a pool over two block devices, ``size`` bytes of data large.

    When it is full, writes fail at once; or with ``low_water`` they wait for it to be made larger, and there is an
    event already when only so many bytes are left.

    Blocks are zeroed before they are handed out, so that no layer sees what another one has deleted.
    """
    chunk = CHUNK // dm.SECTOR
    sectors = size // CHUNK * chunk
    when_full = "0 1 error_if_no_space" if low_water is None else f"{low_water // CHUNK} 0"
    return [dm.Target(0, sectors, "thin-pool", f"{metadata} {data} {chunk} {when_full}")]
