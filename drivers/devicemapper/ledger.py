"""The database of devices: which volume is which thin device of the pool, and what is being done to it.

A step that changes the pool is written down before it is taken and again when it is done, each time durably. The number
of the pool's last transaction is written down with it; the pool keeps the same number (`layerfs.thinpool`), so that a
pool and a database that do not belong together are noticed.

Only `State.READY` devices are volumes; one in another state is found by `Ledger.unfinished` after its process was
killed, or is `State.REPLACED`.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfs.errors import Damaged, OutOfSpace
from layerfs.thinpool import LAST_ID

BLANK = ""
"""The name of the volume that is no volume: an empty file system, which volumes without a parent are snapshots of."""

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS device (
    id INTEGER PRIMARY KEY,  -- the pool's number of the thin device
    volume TEXT NOT NULL,
    state TEXT NOT NULL,
    origin INTEGER,  -- the device that is its parent, or the blank one
    size INTEGER NOT NULL,  -- bytes of the device
    size_limit INTEGER,  -- bytes that may be added to the parent's tree
    sealed_at INTEGER,  -- in ns since 1970, by the system's clock
    times_full INTEGER NOT NULL,  -- how often the pool had been full when the device was made
    notes_faults INTEGER NOT NULL,  -- whether the device itself can tell that a write to it failed
    root_mtime INTEGER,  -- of the root directory, in ns, while the limit is being changed
    used INTEGER  -- bytes of its own, once it is sealed and they have been counted
)""",
    "CREATE UNIQUE INDEX IF NOT EXISTS device_of_volume ON device (volume)",
    "CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
)
_COLUMNS = "id, volume, state, origin, size, size_limit, sealed_at, times_full, notes_faults, root_mtime, used"


class State(enum.StrEnum):
    """What is being done to a device."""

    READY = "ready"
    CREATING = "creating"
    SUSPENDED = "suspended"
    """Its writers wait until a snapshot has been taken."""
    LIMITING = "limiting"
    REPLACED = "replaced"
    """Its volume has another device now. It goes when nobody has it open any more."""
    REMOVING = "removing"


@dataclass(frozen=True, slots=True)
class Device:
    """One row: see the schema."""

    id: int
    volume: str
    state: State
    origin: int | None
    size: int
    size_limit: int | None
    sealed_at: int | None
    times_full: int
    notes_faults: bool
    root_mtime: int | None
    used: int | None

    @property
    def is_sealed(self) -> bool:
        """Whether it cannot change any more."""
        return self.sealed_at is not None

    @property
    def is_volume(self) -> bool:
        """Whether a volume has it, whole or half made: the blank one is none, nor is one of a name with a space."""
        return self.volume != BLANK and " " not in self.volume

    @property
    def replacement(self) -> str:
        """What a device is called until it replaces this one."""
        return f"{self.id} replacing"


class Ledger:
    """The database in the file ``path``. Any number of processes and threads may use it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._own = threading.local()
        with self._connected() as database:
            for statement in _SCHEMA:
                database.execute(statement)
        os.chmod(path, 0o600)

    def find(self, volume: str) -> Device | None:
        """The device of a volume, in whatever state."""
        rows = self._select("WHERE volume = ?", volume)
        return rows[0] if rows else None

    def all(self) -> list[Device]:
        """Every device."""
        return self._select("ORDER BY id")

    def unfinished(self) -> list[Device]:
        """The devices that something was being done to when its process ended, the oldest first."""
        return self._select("WHERE state != 'ready' ORDER BY id")

    def begin(self, volume: str, size: int, **values: int | None) -> Device:
        """Note a device that is about to be made, with further columns, under the lowest number that is free."""
        with self._connected() as database:
            number = database.execute(
                "SELECT min(n) FROM (SELECT 1 AS n UNION SELECT id + 1 FROM device) "
                "WHERE n NOT IN (SELECT id FROM device)"
            ).fetchone()[0]
            if number > LAST_ID:
                raise OutOfSpace(f"a thin pool has no more than {LAST_ID} devices; remove some layers")
            columns = {"id": number, "volume": volume, "state": State.CREATING, "size": size, **values}
            places = ", ".join("?" * len(columns))
            command = f"INSERT INTO device ({', '.join(columns)}) VALUES ({places}) RETURNING {_COLUMNS}"  # noqa: S608
            row = database.execute(command, tuple(columns.values())).fetchone()
            self._advance(database)
            return _device(row)

    def condemn(self, device: Device) -> None:
        """Note that a device is about to be deleted."""
        with self._connected() as database:
            database.execute("UPDATE device SET state = ? WHERE id = ?", (State.REMOVING, device.id))
            self._advance(database)

    def replace(self, device: Device, by: Device, **values: int | str | None) -> None:
        """Note that a volume is on another device from now on, whose columns are set."""
        with self._connected() as database:
            _change(database, device, volume=f"{device.id} replaced", state=State.REPLACED)
            _change(database, by, volume=device.volume, state=State.READY, **values)
            self._advance(database)

    def forget(self, device: Device) -> None:
        """Note that a device is gone."""
        with self._connected() as database:
            database.execute("DELETE FROM device WHERE id = ?", (device.id,))

    def change(self, device: Device, **values: int | str | None) -> None:
        """Set columns of a device."""
        with self._connected() as database:
            _change(database, device, **values)

    def fact(self, name: str) -> str | None:
        """A fact about the whole."""
        with self._connected(write=False) as database:
            row = database.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
            return row[0] if row else None

    def set_fact(self, name: str, value: str) -> None:
        """Note a fact about the whole."""
        with self._connected() as database:
            database.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, value))

    @property
    def transaction(self) -> int:
        """The number that the pool has, or will have once the step that is under way is done."""
        return int(self.fact("transaction") or 0)

    def _advance(self, database: sqlite3.Connection) -> None:
        database.execute(
            "INSERT INTO fact VALUES ('transaction', '1') "
            "ON CONFLICT (name) DO UPDATE SET value = CAST(value AS INTEGER) + 1"
        )

    def _select(self, where: str, *values: str) -> list[Device]:
        with self._connected(write=False) as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM device {where}", values).fetchall()  # noqa: S608
        return [_device(row) for row in rows]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Use one connection for all that this thread does in the context."""
        with self._reported():
            database = sqlite3.connect(self._path, timeout=60, isolation_level=None)
            self._own.database = database
            try:
                yield
            finally:
                del self._own.database
                database.close()

    @contextmanager
    def _connected(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """A connection, in a transaction if it is to write, which ends well with the context.

        None outlives the outermost context, for fork(2) must not take one along.
        """
        with self._reported(), contextlib.ExitStack() as stack:
            database: sqlite3.Connection | None = getattr(self._own, "database", None)
            if database is None:
                database = sqlite3.connect(self._path, timeout=60, isolation_level=None)
                stack.callback(database.close)
            if not write:
                yield database
                return
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                database.rollback()
                raise

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OutOfSpace(f"writing {str(self._path)!r}: {error}; free some space") from error
            raise Damaged(f"the database of devices {str(self._path)!r} cannot be used: {error}") from error


def _change(database: sqlite3.Connection, device: Device, **values: int | str | None) -> None:
    columns = ", ".join(f"{name} = ?" for name in values)
    database.execute(f"UPDATE device SET {columns} WHERE id = ?", (*values.values(), device.id))  # noqa: S608


def _device(row: tuple[Any, ...]) -> Device:
    found = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return Device(**found | {"state": State(found["state"]), "notes_faults": bool(found["notes_faults"])})
