"""One opening of a store by one process: what every part of the store works with."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerfs import mounts
from layerfs.backing import Backing
from layerfs.database import NOBODY, Database, Row, State
from layerfs.driver import Driver
from layerfs.errors import FailedPrecondition, LayerfsError, NotFound, told
from layerfs.layer import Kind
from layerfs.locks import LockFile
from layerfs.reserve import Reserve

log = logging.getLogger("layerfs")

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Session:
    """One opening of a store.

    Attributes:
        root: the store's directory, without links in its path.
        number: of the session, whose byte in the lock file is held as long as it lives.
    """

    root: Path
    number: int
    locks: LockFile
    database: Database
    backing: Backing
    driver: Driver
    reserve: Reserve

    # Names

    def place(self, layer: int) -> Path:
        """Where a layer is mounted."""
        return self.places / named(layer)

    @property
    def places(self) -> Path:
        """The directory of the layers' mount points."""
        return self.root / "mnt"

    @property
    def records(self) -> Path:
        """The directory of the tar records."""
        return self.root / "records"

    def record(self, volume: int) -> Path:
        """Where the tar record of a volume is, if it has one."""
        return self.records / named(volume)

    # Layers

    def visible(self, key: str) -> Row:
        """The layer that users see under this key. Raises `NotFound`."""
        row = self.database.find(key)
        if row is None or row.state in (State.CREATING, State.REMOVING):
            raise NotFound(f"there is no layer {key!r}")
        return row

    def idle(self, key: str) -> Row:
        """The layer under this key, which nobody is at work on. Raises `NotFound`, `FailedPrecondition`."""
        row = self.visible(key)
        if row.state is not State.READY:
            raise FailedPrecondition(f"the layer {key!r} is busy: {self.worker(row)}")
        return row

    def removable(self, key: str) -> Row:
        """As `idle`, or one whose commit failed half-way: where space is short, nothing but removing may help."""
        row = self.visible(key)
        return row if row.state is State.SEALING and row.owner == NOBODY else self.idle(key)

    def volumes(self, row: Row) -> tuple[str, list[str]]:
        """The volume that shows the layer, and the volumes of its ancestors, nearest first."""
        first, *others = map(named, self.database.ancestry(row.number))
        return first, others

    def worker(self, row: Row) -> str:
        """Who is at work on a layer, for people."""
        what = {State.BUSY: "using it for a diff or an apply", State.SEALING: "committing it"}.get(row.state, "at it")
        pid = self.database.sessions().get(row.owner or NOBODY)
        if pid is None:
            return "an operation on it failed half-way; run `layerfs check --repair`"
        return f"process {pid} is {what}"

    # Work on volumes

    def create(self, volume: str, parents: Sequence[str], size: int | None = None) -> None:
        """Make a writable volume, see `Driver.create`; the root of an empty one has no time but the epoch.

        An archive that says nothing of the root makes the same tree everywhere then, whenever it is unpacked.
        """
        self.driver.create(volume, parents, size=size)
        if not parents:
            with mounts.opened(self.driver.mounts(volume, parents)) as root:
                os.utime(root, ns=(0, 0))

    def discard(self, volume: int) -> bool:
        """Take a volume away that belongs to no layer, with its record; whether that was done.

        What fails is logged, and left to `Store.cleanup`.
        """
        try:
            self.driver.remove(named(volume))
            self.record(volume).unlink(missing_ok=True)
            self.database.delete_volume(volume)
        except Exception as error:
            log_failure(f"removing the volume {named(volume)!r} is left for later", error)
        else:
            return True
        try:
            self.reserve.use()
            self.database.own_volume(volume, NOBODY)
        except LayerfsError as error:  # it stays this session's, and the next one sees to it
            log_failure(f"noting that of the volume {named(volume)!r}", error)
        return False

    def note(self, layer: int, **values: str | int | None) -> None:
        """Set columns of a layer when work on it has ended or failed, if need be in the space that is set aside."""
        self.reserve.use()
        self.database.change(layer, **values)

    def forget_diff(self, row: Row) -> None:
        """Forget the diff ID of an active layer, and its record: it may be written to from now on.

        Not where a commit of it has begun meanwhile: nobody may write to it then, and the diff ID is the commit's.
        """
        if not row.layer.diff_id:
            return
        with self.database.transaction():
            now = self.database.numbered(row.number)
            if now is not None and now.kind is Kind.ACTIVE and now.new_key is None:
                assert row.volume is not None
                self.database.change(row.number, diff_id="", diff_size=0, diff_entries=0, record="")
                self.record(row.volume).unlink(missing_ok=True)


def log_failure(what: str, error: Exception) -> None:
    """Log what nobody waits for; of a fault in layerfs, where it is."""
    log.warning("%s: %s", what, error, exc_info=None if told(error) else error)


def named(number: int) -> str:
    """The name of a volume or mount point: its number in base 36, because mount options are short."""
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
        if not number:
            return digits


def numbered(name: str) -> int | None:
    """The number of a volume or mount point; None for a name that is no such."""
    try:
        number = int(name, 36)
    except ValueError:
        return None
    return number if named(number) == name else None
