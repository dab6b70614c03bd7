"""What goes in and out of layers: changes and diffs of them, archives applied to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import BinaryIO

from layerfs.apply import Applied
from layerfs.database import RecordKind, Row, State
from layerfs.diff import Written, nowhere, write_diff
from layerfs.driver import Change
from layerfs.errors import Damaged, FailedPrecondition
from layerfs.filling import Filling
from layerfs.layer import Kind
from layerfs.mounting import Mounting
from layerfs.record import created, rebuild
from layerfs.session import Session, named


class Transfer:
    """Reads and fills layers for one session."""

    def __init__(self, session: Session, mounting: Mounting) -> None:
        self._session = session
        self._database = session.database
        self._mounting = mounting

    def changes(self, key: str) -> Iterator[Change]:
        """What a layer changes against its parent."""
        with self._read(key) as row, self._changes(row) as (changes, _):
            yield from changes

    def diff(self, key: str, out: BinaryIO, *, source_date_epoch: int | None, digest: bool) -> Written:
        """Write a layer's diff: the archive that was applied to it, as it was, or the canonical one."""
        with self._read(key) as row:
            if row.record is RecordKind.ARCHIVE and source_date_epoch is None:
                with _naming(row):
                    self.rebuild(row, out)
                return row.diff
            with self._changes(row) as (changes, new):
                written = write_diff(changes, new, out, source_date_epoch=source_date_epoch, digest=digest)
            if row.kind is Kind.COMMITTED and written.diff_id and source_date_epoch is None and not row.layer.diff_id:
                with self._database.transaction():
                    self._database.set_diff(row.number, written, RecordKind.NONE)
            return written

    def rebuild(self, row: Row, out: BinaryIO) -> None:
        """Write the archive that the layer was made of. Raises `Damaged`, naming what is not as it was."""
        assert row.volume is not None
        with contextlib.ExitStack() as stack:
            try:
                record = stack.enter_context(open(self._session.record(row.volume), "rb"))
            except FileNotFoundError:
                raise Damaged("its tar record is missing") from None
            rebuild(record, stack.enter_context(self._mounting.opened(row)), out)

    def measure(self, row: Row) -> None:
        """Compute the diff ID of an active layer that this session works on, and keep a record of the diff."""
        assert row.volume is not None
        with (
            created(self._session.record(row.volume)) as record,
            self._changes(row) as (changes, new),
            nowhere() as out,
        ):
            written = write_diff(changes, new, out, record=record)
        with self._database.transaction():
            self._database.set_diff(row.number, written, RecordKind.DIFF)

    def verify(self, row: Row) -> None:
        """Raise `Damaged` where a committed layer is not what its diff ID says."""
        if row.record is RecordKind.ARCHIVE:
            with nowhere() as out:
                self.rebuild(row, out)
            if row.shape != self._measured(row, contents=False):
                raise Damaged("names, owners, modes, times or attributes of its files are not what was applied")
            return
        found = self._measured(row)
        if found != row.layer.diff_id:
            if row.record is RecordKind.DIFF:
                with nowhere() as out:
                    self.rebuild(row, out)  # names the file, where it is a file's content
            raise Damaged(f"its diff ID is {found}, but should be {row.layer.diff_id}")

    def _measured(self, row: Row, *, contents: bool = True) -> str:
        """What the diff ID, or the shape, of a layer is now."""
        with self._changes(row) as (changes, new), nowhere() as out:
            return write_diff(changes, new, out, contents=contents).diff_id

    def apply(
        self, key: str, stream: BinaryIO, *, devices: bool, verified: bool, progress: Callable[[int], None] | None
    ) -> Applied:
        """Apply an archive to an active layer: on a copy, which takes the layer's place when it is whole."""
        with self._working(key) as row:
            if row.kind is not Kind.ACTIVE:
                raise FailedPrecondition(f"the layer {key!r} is {row.kind}; only an active layer takes a diff")
            self._mounting.check_unused(row)
            assert row.volume is not None
            driver, me = self._session.driver, self._session.number
            source, parents = self._session.volumes(row)
            fresh = not self._has_content(row)
            copy = self._database.new_volume(me)
            filling = Filling(
                driver,
                named(copy),
                parents,
                make=partial(driver.fork, named(copy), source, parents),
                source=_again(stream),
                repeatable=_seekable(stream),
                record=self._session.record(copy),
                fresh=fresh,
                devices=devices,
                verified=verified,
                progress=progress,
            )
            try:
                applied = filling.fill()
                # The archive is the layer's diff only where the layer held nothing before.
                shape = filling.shape() if fresh else ""
            except BaseException:
                self._session.discard(copy)
                raise
            with self._database.transaction():
                self._database.change(row.number, volume=copy)
                self._database.own_volume(copy, None)
                self._database.own_volume(row.volume, me)
                if fresh:
                    written = Written(applied.diff_id, applied.size, applied.entries)
                    self._database.set_diff(row.number, written, RecordKind.ARCHIVE, shape)
            if not fresh:
                self._session.forget_diff(row)
                self._session.record(copy).unlink(missing_ok=True)
            self._session.discard(row.volume)
            return applied

    def _has_content(self, row: Row) -> bool:
        """Whether an active layer changes anything against its parent, or against an empty tree."""
        with self._changes(row) as (changes, _):
            return any(change.path or row.parent for change in changes)

    # Steps

    @contextmanager
    def _read(self, key: str) -> Iterator[Row]:
        """The layer, which stays as it is for the body: an active one is marked as in use."""
        row = self._session.visible(key)
        if row.kind is Kind.ACTIVE:
            with self._working(key) as row:
                yield row
        else:
            yield row

    @contextmanager
    def _working(self, key: str) -> Iterator[Row]:
        """The layer, marked as in use for the body."""
        with self._database.transaction():
            row = self._session.idle(key)
            self._database.change(row.number, state=State.BUSY, owner=self._session.number)
        try:
            yield row
        finally:
            self._session.note(row.number, state=State.READY, owner=None)

    @contextmanager
    def _changes(self, row: Row) -> Iterator[tuple[Iterator[Change], int]]:
        """The layer's changes, and a descriptor of its tree."""
        with self._mounting.opened(row) as new:
            if row.volume is None:  # a view of its parent
                yield iter(()), new
                return
            volume, parents = self._session.volumes(row)
            above = None if row.parent is None else self._database.numbered(row.parent)
            with self._mounting.opened(above) if above is not None else contextlib.nullcontext() as old:
                yield self._session.driver.changes(volume, parents, old, new), new


@contextmanager
def _naming(row: Row) -> Iterator[None]:
    """Say of which layer it is that something is damaged."""
    try:
        yield
    except Damaged as error:
        raise Damaged(f"the layer {row.key!r} is damaged: {error}; run `layerfs check`") from error


def _seekable(stream: BinaryIO) -> bool:
    with contextlib.suppress(OSError, AttributeError):
        return stream.seekable()
    return False


def _again(stream: BinaryIO) -> Callable[[], AbstractContextManager[BinaryIO]]:
    """Opens a stream where it stands now, each time; it stays open."""
    start = stream.tell() if _seekable(stream) else None

    def opened() -> AbstractContextManager[BinaryIO]:
        if start is not None:
            stream.seek(start)
        return contextlib.nullcontext(stream)

    return opened
