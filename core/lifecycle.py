"""The life of layers: prepared or viewed, committed, removed."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from layerfs.database import Row, State, checked_text, encoded
from layerfs.driver import Capability
from layerfs.errors import (
    AlreadyExists,
    EnvironmentUnfit,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from layerfs.layer import Kind, Layer
from layerfs.mounting import Mounting
from layerfs.recovery import Recovery
from layerfs.session import Session
from layerfs.settling import boot, check_written_out
from layerfs.transfer import Transfer

_REMOVED: Final = " (removed "
"""Stands in the key of a layer whose data is not gone yet, after the key that it had."""


class Lifecycle:
    """Makes, commits and removes layers for one session."""

    def __init__(self, session: Session, mounting: Mounting, recovery: Recovery, transfer: Transfer) -> None:
        self._session = session
        self._database = session.database
        self._mounting = mounting
        self._recovery = recovery
        self._transfer = transfer
        # One thread, so that a child goes before its parent.
        self._removals = ThreadPoolExecutor(1, thread_name_prefix="remove")
        self._going: set[int] = set()

    def make(self, key: str, kind: Kind, parent: str, labels: Mapping[str, str], size: int | None) -> Row:
        """Make an active layer or a view."""
        check_key(key)
        check_labels(labels)
        if size is not None and size <= 0:
            raise InvalidArgument(f"a size limit of {size} bytes is no limit; give more, or leave it out")
        if size is not None and not self._session.driver.capabilities & Capability.SIZE_LIMIT:
            name = self._session.driver.name
            raise EnvironmentUnfit(f"the driver {name!r} cannot limit a layer's size on this backing")
        has_volume = kind is Kind.ACTIVE or not parent
        with self._database.transaction():
            self._check_free(key)
            above = self._parent(parent)
            me = self._session.number
            has_volume = has_volume or above is None
            volume = self._database.new_volume(me) if has_volume else None
            state, owner = (State.CREATING, me) if has_volume else (State.READY, None)
            number = self._database.insert(key, kind, above, volume, state, owner, labels, size)
        row = self._numbered(number)
        if has_volume:
            try:
                self._create(row, size)
            except BaseException:
                self._recovery.finish_or_give_up(row)
                raise
        return dataclasses.replace(row, state=State.READY, owner=None)

    def commit(self, name: str, key: str, labels: Mapping[str, str], *, digest: bool) -> Layer:
        """Make an active layer a committed one, called ``name``."""
        check_key(name)
        check_labels(labels)
        with self._database.transaction():
            row = self._session.idle(key)
            if row.kind is not Kind.ACTIVE:
                raise FailedPrecondition(f"the layer {key!r} is {row.kind}; only an active layer can be committed")
            self._check_free(name)
            measures = digest and not row.layer.diff_id
            self._database.change(
                row.number,
                state=State.BUSY if measures else State.SEALING,
                owner=self._session.number,
                new_key=name,
                new_labels=encoded(labels),
            )
            self._database.mark_unsettled(row.number, boot())
        if measures:
            try:
                self._mounting.take_down(row)
                self._transfer.measure(row)
                self._database.change(row.number, state=State.SEALING)
            except BaseException:
                self._recovery.unlock(row)
                raise
        row = self._numbered(row.number)
        try:
            self._recovery.seal(row)
        except Exception as error:  # but an interruption ends the session, and leaves it to the next one
            self._recovery.give_up(row, error)
            raise
        return self._numbered(row.number).layer

    def remove(self, key: str, *, wait: bool) -> None:
        """Take a layer away; without ``wait``, its data some time later, and its key is free at once."""
        if wait and self._database.children(self._session.removable(key).number):  # which may be about to go
            self.wait()
        self._session.reserve.use()
        with self._database.transaction():
            row = self._session.removable(key)
            if children := self._database.children(row.number, self._going.copy()):
                some = ", ".join(map(repr, children[:2])) + (" and more" if len(children) > 2 else "")
                raise FailedPrecondition(f"cannot remove the layer {key!r}: it has children; remove {some} first")
            if image := self._database.image_on(key):
                raise FailedPrecondition(f"the layer {key!r} is used by image {image!r}; remove the image first")
            self._database.change(row.number, state=State.REMOVING, owner=self._session.number)
        try:
            if wait:
                self._recovery.remove(row)
            else:
                self._mounting.take_down(row)
                self.remove_later(row)
        except Exception as error:
            self._recovery.give_up(row, error)
            raise

    def remove_later(self, row: Row) -> None:
        """Take a layer away in a thread that this session has begun to make or to remove; its key is free at once."""
        key = f"{row.key.partition(_REMOVED)[0]}{_REMOVED}{secrets.token_hex(8)})"
        self._database.change(row.number, key=key, state=State.REMOVING)
        self._going.add(row.number)
        self._removals.submit(self._remove_data, self._numbered(row.number))

    def close(self) -> None:
        """Wait for the removal that is under way; those that have not begun are left to the next session."""
        self._removals.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Wait for the removals that nobody has waited for."""
        if self._going:
            self._removals.submit(lambda: None).result()

    def _remove_data(self, row: Row) -> None:
        try:
            self._recovery.finish_or_give_up(row)
        finally:
            self._going.discard(row.number)

    def _create(self, row: Row, size: int | None) -> None:
        assert row.volume is not None
        volume, parents = self._session.volumes(row)
        self._session.create(volume, parents, size)
        if row.kind is Kind.VIEW:
            self._session.driver.seal(volume, parents)
        with self._database.transaction():
            self._database.own_volume(row.volume, None)
            self._database.change(row.number, state=State.READY, owner=None)

    def _parent(self, name: str) -> int | None:
        """The number of the committed layer of this key, or of the topmost layer of the image of this name."""
        if not name:
            return None
        row = self._database.find(name)
        if row is None and (image := self._database.image(name)) is not None:
            if not image.top_chain_id:
                return None
            row = self._database.find(image.top_chain_id)
        if row is None or row.state in (State.CREATING, State.REMOVING):
            raise NotFound(f"there is no layer or image {name!r} to be a parent")
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"the layer {name!r} is {row.kind}; only a committed layer can be a parent")
        check_written_out(self._database, row)
        return row.number

    def _check_free(self, key: str) -> None:
        if self._database.is_taken(key):
            raise AlreadyExists(f"there is already a layer {key!r}")

    def _numbered(self, number: int) -> Row:
        row = self._database.numbered(number)
        assert row is not None
        return row


def check_key(key: str) -> None:
    """Refuse what cannot be a key (`InvalidArgument`)."""
    if not key:
        raise InvalidArgument("a layer's key cannot be empty")
    checked_text("the key", [key])


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse what cannot be labels (`InvalidArgument`)."""
    checked_text("the label", [*labels, *labels.values()])
