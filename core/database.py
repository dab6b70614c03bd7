"""What a store knows, in SQLite: layers, their volumes, mounts, images, and the sessions that work on them.

Every operation on a volume is written down before it begins (`State`, and the session that does it) and again when it
is done. A transaction is never open while a driver works.
"""

# ruff: noqa: S608 - only names of columns and question marks are put into statements

from __future__ import annotations

import enum
import json
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from layerfs import digest
from layerfs.diff import Written
from layerfs.driver import Usage
from layerfs.errors import Damaged, InvalidArgument, LayerfsError, OutOfSpace, told
from layerfs.layer import Kind, Layer

VERSION = 2
"""Of the schema below; kept in SQLite's ``user_version``."""

NOBODY = 0
"""The owner of work that was given up; no session has this number."""

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

-- A session is one opening of the store by one process; it lives as long as its byte in the lock file is held.
CREATE TABLE sessions (number INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL) STRICT;

-- A volume with an owner belongs to no layer yet, or no longer: it goes when the owner is gone.
CREATE TABLE volumes (number INTEGER PRIMARY KEY AUTOINCREMENT, owner INTEGER) STRICT;
CREATE INDEX volumes_owner ON volumes (owner) WHERE owner IS NOT NULL;

CREATE TABLE layers (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    parent INTEGER REFERENCES layers (number),
    volume INTEGER UNIQUE REFERENCES volumes (number),  -- none: a view of its parent
    state TEXT NOT NULL,
    owner INTEGER,                                      -- the session that is at work on it
    created INTEGER NOT NULL,                           -- microseconds since the epoch
    updated INTEGER NOT NULL,
    labels TEXT NOT NULL,
    diff_id TEXT NOT NULL DEFAULT '',
    chain_id TEXT NOT NULL DEFAULT '',
    diff_size INTEGER NOT NULL DEFAULT 0,
    diff_entries INTEGER NOT NULL DEFAULT 0,
    record TEXT NOT NULL DEFAULT '',
    shape TEXT NOT NULL DEFAULT '',                     -- of an archive: see Filling.shape
    size_limit INTEGER,
    size INTEGER,                                       -- usage, once known for good
    inodes INTEGER,
    new_key TEXT UNIQUE,                                -- of a commit under way
    new_labels TEXT
) STRICT;
CREATE INDEX layers_parent ON layers (parent) WHERE parent IS NOT NULL;
CREATE INDEX layers_owner ON layers (owner) WHERE owner IS NOT NULL;

-- One reference to a mounted layer; target '' is the layer's own place, session NULL outlives its process.
CREATE TABLE mounts (
    number INTEGER PRIMARY KEY,
    layer INTEGER NOT NULL REFERENCES layers (number) ON DELETE CASCADE,
    target TEXT NOT NULL,
    session INTEGER,
    namespace INTEGER NOT NULL
) STRICT;
CREATE INDEX mounts_layer ON mounts (layer);
CREATE INDEX mounts_target ON mounts (target);

CREATE TABLE images (
    name TEXT PRIMARY KEY,
    manifest_digest TEXT NOT NULL,
    config_digest TEXT NOT NULL,
    top_chain_id TEXT NOT NULL,
    created TEXT NOT NULL
) STRICT;
CREATE INDEX images_top ON images (top_chain_id);
"""

# What version 2 brought: layers that are or were committed and whose data may not be written out; see `Settling`.
_UNSETTLED = """
CREATE TABLE unsettled (
    layer INTEGER PRIMARY KEY REFERENCES layers (number) ON DELETE CASCADE,
    boot TEXT NOT NULL
) STRICT
"""

_PAGE = 500
_ROOM = 1 << 16
"""Bytes that SQLite takes at least, for the file beside the database that its processes share."""
_SELECT = (
    "SELECT layer.*, above.key AS parent_key FROM layers layer LEFT JOIN layers above ON above.number = layer.parent"
)


class State(enum.StrEnum):
    """How far the work on a layer has come. All but `READY` have an owner."""

    CREATING = "creating"
    """Not there yet for anybody else; undone when the owner is gone."""
    READY = "ready"
    BUSY = "busy"
    """Being applied to or measured; as it was when the owner is gone."""
    SEALING = "sealing"
    """Becoming committed; finished when the owner is gone."""
    REMOVING = "removing"
    """Not there any more for anybody else; finished when the owner is gone."""


class RecordKind(enum.StrEnum):
    """What the tar record of a layer was made of."""

    NONE = ""
    ARCHIVE = "archive"
    """An archive that was applied; only the record can give its bytes again."""
    DIFF = "diff"
    """The canonical diff, whose bytes the tree gives as well."""


@dataclass(frozen=True, slots=True)
class Row:
    """One layer as the database has it; ``layer`` is the part that users see."""

    number: int
    layer: Layer
    parent: int | None
    volume: int | None
    state: State
    owner: int | None
    diff: Written
    record: RecordKind
    shape: str
    usage: Usage | None
    new_key: str | None
    new_labels: str | None

    @property
    def key(self) -> str:
        return self.layer.key

    @property
    def kind(self) -> Kind:
        return self.layer.kind


@dataclass(frozen=True, slots=True)
class MountRow:
    """One reference to a mounted layer.

    Attributes:
        layer: the layer's number.
        target: a bind of the layer's mount, or "" for its own place.
        session: the session that it goes with, or None.
        namespace: inode number of the mount namespace that it was made in.
    """

    number: int
    layer: int
    target: str
    session: int | None
    namespace: int


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image: a name, the digests of its documents and the chain ID of its topmost layer ("" without layers)."""

    name: str
    manifest_digest: str
    config_digest: str
    top_chain_id: str
    created: str


class Database:
    """The database of one store. One object serves all threads of a process: a lock goes round each statement.

    Args:
        path: made where there is none.

    Raises `InvalidArgument` where it was written by a newer version, `Damaged` where it is no database.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        with self._reported():
            self._connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def discard(self) -> None:
        """Close it, and take its files away. Nobody else may have it open."""
        self.close()
        for ending in ("-wal", "-shm", ""):
            Path(f"{self._path}{ending}").unlink(missing_ok=True)

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        """All statements of the body, or none. Not to be nested.

        With ``durable``, they and all before them outlast a crash of the machine once this has returned.
        """
        with self._lock, self._reported():
            if durable:
                self._connection.execute("PRAGMA synchronous = FULL")
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                if durable:
                    self._connection.execute("PRAGMA synchronous = NORMAL")

    # Facts and sessions

    def fact(self, name: str) -> str | None:
        row = self._one("SELECT value FROM facts WHERE name = ?", name)
        return None if row is None else str(row["value"])

    def set_fact(self, name: str, value: str) -> None:
        self._run("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)

    def sessions(self) -> dict[int, int]:
        """The process ID of every session that has not ended, dead or alive."""
        return {row["number"]: row["pid"] for row in self._all("SELECT number, pid FROM sessions")}

    def owners(self) -> set[int]:
        """Every session that has not ended, or that work or mounts are still said to be of; `NOBODY` may be one."""
        query = (
            "SELECT number FROM sessions"
            " UNION SELECT owner FROM layers WHERE owner IS NOT NULL"
            " UNION SELECT owner FROM volumes WHERE owner IS NOT NULL"
            " UNION SELECT session FROM mounts WHERE session IS NOT NULL"
        )
        return {row["number"] for row in self._all(query)}

    def begin_session(self, pid: int) -> int:
        return self._run("INSERT INTO sessions (pid) VALUES (?)", pid)

    def end_session(self, number: int) -> None:
        self._run("DELETE FROM sessions WHERE number = ?", number)

    # Layers

    def find(self, key: str) -> Row | None:
        """The layer ``key`` in whatever state."""
        row = self._one(f"{_SELECT} WHERE layer.key = ?", key)
        return None if row is None else _row(row)

    def numbered(self, number: int) -> Row | None:
        row = self._one(f"{_SELECT} WHERE layer.number = ?", number)
        return None if row is None else _row(row)

    def is_taken(self, key: str) -> bool:
        """Whether a layer has this key, or will have it when a commit under way is done."""
        query = "SELECT EXISTS (SELECT 1 FROM layers WHERE key = ?) OR EXISTS (SELECT 1 FROM layers WHERE new_key = ?)"
        return bool(self._value(query, key, key))

    def rows(self) -> Iterator[Row]:
        """Every layer in whatever state, in the order of their making; made and removed meanwhile are no trouble."""
        last = 0
        while found := self._all(f"{_SELECT} WHERE layer.number > ? ORDER BY layer.number LIMIT {_PAGE}", last):
            yield from map(_row, found)
            last = found[-1]["number"]

    def children(self, number: int, but: Collection[int] = ()) -> list[str]:
        """The keys of some layers that have this one as their parent, and whose numbers are none of ``but``."""
        rows = self._all("SELECT number, key FROM layers WHERE parent = ? LIMIT ?", number, 3 + len(but))
        return [row["key"] for row in rows if row["number"] not in but]

    def ancestry(self, number: int | None) -> list[int]:
        """The volumes of a layer and of its ancestors, nearest first; of a view of a layer, those of the layer."""
        rows = self._all(
            "WITH RECURSIVE chain (parent, volume, depth) AS ("
            " SELECT parent, volume, 0 FROM layers WHERE number = ?"
            " UNION ALL SELECT layers.parent, layers.volume, depth + 1 FROM layers, chain"
            " WHERE layers.number = chain.parent"
            ") SELECT volume FROM chain WHERE volume IS NOT NULL ORDER BY depth",
            number,
        )
        return [row["volume"] for row in rows]

    def unpacked(self) -> list[str]:
        """The keys of all layers that came with an image, the newest first."""
        query = "SELECT key FROM layers WHERE chain_id = key AND record = ? AND state = ? ORDER BY number DESC"
        return [row["key"] for row in self._all(query, RecordKind.ARCHIVE, State.READY)]

    def insert(
        self,
        key: str,
        kind: Kind,
        parent: int | None,
        volume: int | None,
        state: State,
        owner: int | None,
        labels: Mapping[str, str],
        size_limit: int | None = None,
    ) -> int:
        now = _now()
        return self._run(
            "INSERT INTO layers (key, kind, parent, volume, state, owner, created, updated, labels, size_limit)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(key, kind, parent, volume, state, owner, now, now, encoded(labels), size_limit),
        )

    def change(self, number: int, **values: str | int | None) -> None:
        """Set columns of a layer, by their names in the schema."""
        columns = ", ".join(f"{name} = ?" for name in values)
        self._run(f"UPDATE layers SET {columns} WHERE number = ?", *values.values(), number)

    def touch(self, number: int, labels: Mapping[str, str]) -> None:
        """Set the labels and the time of the last update."""
        self.change(number, labels=encoded(labels), updated=_now())

    def commit(self, number: int, key: str, labels: str) -> None:
        """Make an active layer a committed one, with another key, new labels (as `encoded`) and new times."""
        now = _now()
        self.change(
            number,
            key=key,
            kind=Kind.COMMITTED,
            labels=labels,
            created=now,
            updated=now,
            state=State.READY,
            owner=None,
            new_key=None,
            new_labels=None,
            size_limit=None,
        )
        self._spread_chain_ids(number)

    def set_diff(self, number: int, diff: Written, record: RecordKind, shape: str = "") -> None:
        """Note what a layer's diff is; of a committed one, the chain IDs that can be told by it follow."""
        sizes = {"diff_size": diff.size, "diff_entries": diff.entries}
        self.change(number, diff_id=diff.diff_id, **sizes, record=record, shape=shape)
        self._spread_chain_ids(number)

    def _spread_chain_ids(self, number: int) -> None:
        todo = [number]
        while todo:
            row = self.numbered(todo.pop())
            if row is None or row.kind is not Kind.COMMITTED or not row.layer.diff_id:
                continue
            above = None if row.parent is None else self.numbered(row.parent)
            if above is not None and not above.layer.chain_id:
                continue
            chain_id = row.layer.diff_id
            if above is not None:
                chain_id = digest.of(f"{above.layer.chain_id} {chain_id}".encode())
            if chain_id != row.layer.chain_id:
                self.change(row.number, chain_id=chain_id)
                below = self._all("SELECT number FROM layers WHERE parent = ?", row.number)
                todo += [child["number"] for child in below]

    def mark_unsettled(self, number: int, boot: str) -> None:
        """Note that a layer's data may not be written out, in this boot of the machine."""
        self._run("INSERT OR REPLACE INTO unsettled VALUES (?, ?)", number, boot)

    def unsettled(self, boot: str) -> list[int]:
        """The layers that were marked in this boot and are at rest since."""
        query = "SELECT layer FROM unsettled JOIN layers ON number = layer WHERE boot = ? AND state = ?"
        return [row["layer"] for row in self._all(query, boot, State.READY)]

    def doubt(self, boot: str) -> list[str]:
        """Let all marks of this boot be as if it were over; the keys of the layers, present or to come."""
        query = "SELECT coalesce(new_key, key) AS name FROM unsettled JOIN layers ON number = layer WHERE boot = ?"
        names = [row["name"] for row in self._all(query, boot)]
        self._run("UPDATE unsettled SET boot = '' WHERE boot = ?", boot)
        return names

    def is_doubtful(self, number: int, boot: str) -> bool:
        """Whether a layer's data may never have been written out: it was marked in an earlier boot, or see `doubt`."""
        query = "SELECT EXISTS (SELECT 1 FROM unsettled WHERE layer = ? AND boot <> ?)"
        return bool(self._value(query, number, boot))

    def settle(self, numbers: Iterable[int], boot: str | None = None) -> None:
        """Take marks away: those of one boot, or of any."""
        for number in numbers:
            self._run("DELETE FROM unsettled WHERE layer = ? AND boot = coalesce(?, boot)", number, boot)

    def delete(self, number: int) -> None:
        """Forget a layer; what it was mounted on is forgotten too."""
        self._run("DELETE FROM layers WHERE number = ?", number)

    def owned(self, *owners: int) -> list[Row]:
        """The layers that these sessions work on, children before their parents."""
        marks = ", ".join("?" * len(owners))
        return [
            _row(row)
            for row in self._all(f"{_SELECT} WHERE layer.owner IN ({marks}) ORDER BY layer.number DESC", *owners)
        ]

    def take_over(self, owner: int, *dead: int) -> None:
        """Make ``owner`` the owner of all that dead sessions worked on."""
        marks = ", ".join("?" * len(dead))
        self._run(f"UPDATE layers SET owner = ? WHERE owner IN ({marks})", owner, *dead)
        self._run(f"UPDATE volumes SET owner = ? WHERE owner IN ({marks})", owner, *dead)

    # Volumes

    def new_volume(self, owner: int) -> int:
        """The number of a volume that is about to be made."""
        return self._run("INSERT INTO volumes (owner) VALUES (?)", owner)

    def own_volume(self, number: int, owner: int | None) -> None:
        """Say whose a volume is; None: its layer's."""
        self._run("UPDATE volumes SET owner = ? WHERE number = ?", owner, number)

    def delete_volume(self, number: int) -> None:
        self._run("DELETE FROM volumes WHERE number = ?", number)

    def stray_volumes(self, *owners: int) -> list[int]:
        """The volumes of these sessions that belong to no layer."""
        marks = ", ".join("?" * len(owners))
        rows = self._all(
            f"SELECT number FROM volumes WHERE owner IN ({marks})"
            " AND NOT EXISTS (SELECT 1 FROM layers WHERE layers.volume = volumes.number)",
            *owners,
        )
        return [row["number"] for row in rows]

    def volumes(self) -> set[int]:
        return {row["number"] for row in self._all("SELECT number FROM volumes")}

    def layer_of(self, volume: int) -> Row | None:
        """The layer whose volume this is."""
        row = self._one(f"{_SELECT} WHERE layer.volume = ?", volume)
        return None if row is None else _row(row)

    # Mounts

    def mounts(self, layer: int | None = None) -> list[MountRow]:
        """The references to one layer, or all there are."""
        if layer is None:
            return [MountRow(**dict(row)) for row in self._all("SELECT * FROM mounts")]
        return [MountRow(**dict(row)) for row in self._all("SELECT * FROM mounts WHERE layer = ?", layer)]

    def mounted_at(self, target: str) -> list[MountRow]:
        return [MountRow(**dict(row)) for row in self._all("SELECT * FROM mounts WHERE target = ?", target)]

    def add_mount(self, layer: int, target: str, session: int | None, namespace: int) -> int:
        columns = "INSERT INTO mounts (layer, target, session, namespace) VALUES (?, ?, ?, ?)"
        return self._run(columns, layer, target, session, namespace)

    def delete_mount(self, number: int) -> None:
        self._run("DELETE FROM mounts WHERE number = ?", number)

    # Images

    def put_image(
        self, name: str, manifest_digest: str, config_digest: str, top_chain_id: str, created: str = ""
    ) -> None:
        """Give an image its name, taking the name from another that had it."""
        values = (name, manifest_digest, config_digest, top_chain_id, created)
        self._run("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?)", *values)

    def image(self, name: str) -> ImageRow | None:
        row = self._one("SELECT * FROM images WHERE name = ?", name)
        return None if row is None else ImageRow(**dict(row))

    def images(self) -> list[ImageRow]:
        """All of them, by name."""
        return [ImageRow(**dict(row)) for row in self._all("SELECT * FROM images ORDER BY name")]

    def delete_image(self, name: str) -> None:
        self._run("DELETE FROM images WHERE name = ?", name)

    def image_on(self, key: str) -> str | None:
        """The name of an image whose topmost layer is the one with this key (the chain ID)."""
        row = self._one("SELECT name FROM images WHERE top_chain_id = ? LIMIT 1", key)
        return None if row is None else str(row["name"])

    # SQLite

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA busy_timeout = 60000")
        version = self._version()
        if version > VERSION:
            raise InvalidArgument(f"{str(self._path)!r} was written by a newer version of layerfs; use that one")
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        if version == VERSION:
            return
        with self.transaction():
            version = self._version()  # another process may have been quicker
            if version < 1:
                for statement in _SCHEMA.split(";\n"):
                    self._connection.execute(statement)
            if version < 2:
                self._connection.execute(_UNSETTLED)
            self._connection.execute(f"PRAGMA user_version = {VERSION}")

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _run(self, statement: str, *values: str | int | None) -> int:
        """Run a statement; the number of the row that it inserted."""
        with self._lock, self._reported():
            return self._connection.execute(statement, values).lastrowid or 0

    def _all(self, query: str, *values: str | int | None) -> list[sqlite3.Row]:
        with self._lock, self._reported():
            return self._connection.execute(query, values).fetchall()

    def _one(self, query: str, *values: str | int | None) -> sqlite3.Row | None:
        found = self._all(query, *values)
        return found[0] if found else None

    def _value(self, query: str, *values: str | int | None) -> Any:
        row = self._one(query, *values)
        assert row is not None
        return row[0]

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _refusal(self._path, error) from error


def encoded(labels: Mapping[str, str]) -> str:
    """Labels as the database keeps them."""
    return json.dumps(dict(labels), ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def checked_text(what: str, texts: Iterable[str]) -> None:
    """Refuse what cannot be kept as text (`InvalidArgument`): bytes of a command line that are not UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"{what} {text!r} is not valid UTF-8") from None


def _refusal(path: Path, error: sqlite3.Error) -> LayerfsError:
    step = f"using the database {str(path)!r}: {error}"
    code = getattr(error, "sqlite_errorname", "")
    if code == "SQLITE_FULL" or (code.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")) and _is_full(path.parent)):
        return OutOfSpace(f"{step}; free some space or raise the limit")
    if code in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return Damaged(f"{step}; restore it from a copy")
    return LayerfsError(step)


def _is_full(directory: Path) -> bool:
    """Whether nothing can be written there for lack of space, or of quota, which SQLite does not always tell."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, _ROOM)
    except OSError as error:
        return isinstance(told(error), OutOfSpace)
    return False


def _row(row: sqlite3.Row) -> Row:
    layer = Layer(
        key=row["key"],
        kind=Kind(row["kind"]),
        parent=row["parent_key"] or "",
        created=_time(row["created"]),
        updated=_time(row["updated"]),
        labels=json.loads(row["labels"]),
        diff_id=row["diff_id"],
        chain_id=row["chain_id"],
        size_limit=row["size_limit"],
    )
    return Row(
        number=row["number"],
        layer=layer,
        parent=row["parent"],
        volume=row["volume"],
        state=State(row["state"]),
        owner=row["owner"],
        diff=Written(row["diff_id"], row["diff_size"], row["diff_entries"]),
        record=RecordKind(row["record"]),
        shape=row["shape"],
        usage=None if row["size"] is None else Usage(row["size"], row["inodes"]),
        new_key=row["new_key"],
        new_labels=row["new_labels"],
    )


def _now() -> int:
    return time.time_ns() // 1000


def _time(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds // 1_000_000, UTC).replace(microsecond=microseconds % 1_000_000)
