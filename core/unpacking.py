"""Brings an image's layers into the store: those that are missing, verified, and all of them or none.

Where a driver takes a diff before its parents are filled, the layers are unpacked side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Final

from layerfs.apply import Applied
from layerfs.database import RecordKind, Row, State
from layerfs.diff import Written
from layerfs.driver import Capability
from layerfs.errors import AlreadyExists, BadLayer, FailedPrecondition
from layerfs.filling import Filling
from layerfs.layer import Kind
from layerfs.locks import content_byte
from layerfs.session import Session, named
from layerfs.settling import Settling, check_written_out

_WORKERS: Final = 4
"""More unpack at once only where there are more processors; each has a thread beside it that decompresses."""


@dataclass(frozen=True, slots=True)
class BlobLayer:
    """One layer of an image that is imported.

    Attributes:
        diff_id, chain_id: what the image's configuration says.
        size: bytes of its blob.
        open: gives the blob, verified while it is read; may be called again, from any thread.
    """

    diff_id: str
    chain_id: str
    size: int
    open: Callable[[], BinaryIO]


class Unpacking:
    """Unpacks images for one session."""

    def __init__(self, session: Session, settling: Settling) -> None:
        self._session = session
        self._settling = settling
        self._database = session.database

    def unpack(self, layers: Sequence[BlobLayer], *, devices: bool) -> None:
        """Make a committed layer for each of ``layers`` (bottom up) that is not there, under its chain ID."""
        # The bytes hold off other imports of the same content; they find the layers ready then.
        with self._session.locks.exclusive(*(content_byte(layer.chain_id) for layer in layers)):
            there = [self._present(layer) for layer in layers]
            missing = [layer for layer, row in zip(layers, there, strict=True) if row is None]
            if not missing:
                return
            base = next((row for row in reversed(there) if row is not None), None)
            volumes: list[int] = []
            try:
                volumes.extend(self._database.new_volume(self._session.number) for _ in missing)
                fillings = self._fillings(missing, volumes, base, devices)
                applied, shapes = [], []
                with contextlib.closing(self._filled(fillings)) as filled:
                    for layer, filling, found in zip(missing, fillings, filled, strict=True):
                        _check(layer, found)
                        self._session.driver.seal(filling.volume, filling.parents)
                        applied.append(found)
                        shapes.append(filling.shape())
                self._settling.sync()
                self._insert(missing, volumes, applied, shapes, base)
            except BaseException as error:
                self._discard(volumes)
                if isinstance(error, Exception) and base is not None and self._is_gone(base):
                    raise FailedPrecondition(
                        f"the layer {base.key!r}, which the image stands on, was removed meanwhile; try again"
                    ) from error
                raise

    def _present(self, layer: BlobLayer) -> Row | None:
        row = self._database.find(layer.chain_id)
        if row is None:
            return None
        if row.kind is not Kind.COMMITTED or row.layer.chain_id != layer.chain_id or row.state is not State.READY:
            raise _taken(layer)
        check_written_out(self._database, row)
        return row

    def _is_gone(self, base: Row) -> bool:
        row = self._database.numbered(base.number)
        return row is None or row.state is State.REMOVING

    def _discard(self, volumes: Sequence[int]) -> None:
        """Take away those of the volumes that are no layer's: an interruption may come when all has been recorded."""
        stray = set(self._database.stray_volumes(self._session.number))
        for volume in reversed(volumes):
            if volume in stray:
                self._session.discard(volume)

    def _fillings(
        self, layers: Sequence[BlobLayer], volumes: Sequence[int], base: Row | None, devices: bool
    ) -> list[Filling]:
        parents: list[str] = []
        if base is not None:
            first, others = self._session.volumes(base)
            parents = [first, *others]
        fillings = []
        for layer, volume in zip(layers, volumes, strict=True):
            name = named(volume)
            filling = Filling(
                self._session.driver,
                name,
                tuple(parents),
                make=partial(self._session.create, name, tuple(parents)),
                source=partial(_opened, layer),
                repeatable=True,
                record=self._session.record(volume),
                devices=devices,
                verified=True,
            )
            fillings.append(filling)
            parents.insert(0, name)
        return fillings

    def _filled(self, fillings: Sequence[Filling]) -> Generator[Applied, None, None]:
        """Fill the volumes from the bottom up, each when the one below it has been sealed."""
        if len(fillings) < 2 or Capability.UPPER not in self._session.driver.capabilities:
            for filling in fillings:
                yield filling.fill()
            return
        for filling in fillings:
            filling.make()
        stop = threading.Event()
        workers = min(_WORKERS, len(fillings), len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers, thread_name_prefix="unpack") as pool:
            begun = [pool.submit(_begin, filling, stop) for filling in fillings]
            try:
                for filling, future in zip(fillings, begun, strict=True):
                    yield filling.finish(future.result())
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _insert(
        self,
        layers: Sequence[BlobLayer],
        volumes: Sequence[int],
        applied: Sequence[Applied],
        shapes: Sequence[str],
        base: Row | None,
    ) -> None:
        parent = None if base is None else base.number
        with self._database.transaction(durable=True):
            for layer, volume, found, shape in zip(layers, volumes, applied, shapes, strict=True):
                if self._database.is_taken(layer.chain_id):  # meanwhile
                    raise _taken(layer)
                self._database.own_volume(volume, None)
                parent = self._database.insert(
                    layer.chain_id, Kind.COMMITTED, parent, volume, State.READY, None, labels={}
                )
                written = Written(found.diff_id, found.size, found.entries)
                self._database.set_diff(parent, written, RecordKind.ARCHIVE, shape)


def _taken(layer: BlobLayer) -> AlreadyExists:
    return AlreadyExists(f"the key {layer.chain_id!r} is taken by a layer that is not the image's; remove it")


def _check(layer: BlobLayer, found: Applied) -> None:
    if found.diff_id != layer.diff_id:
        raise BadLayer(
            f"the layer with the chain ID {layer.chain_id} has the diff ID {found.diff_id}, "
            f"but should have {layer.diff_id}"
        )


class _Stopped(Exception):
    """Another layer of the image cannot be unpacked."""


def _begin(filling: Filling, stop: threading.Event) -> Applied | None:
    def check(_size: int) -> None:
        if stop.is_set():
            raise _Stopped

    return dataclasses.replace(filling, progress=check).begin()


def _opened(layer: BlobLayer) -> contextlib.closing[BinaryIO]:
    return contextlib.closing(layer.open())
