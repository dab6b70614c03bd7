"""The store: a directory of layers on one driver, with the semantics of containerd's snapshotter."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Self

from layerfs import filters
from layerfs.apply import Applied
from layerfs.backing import Backing, BackingSpec, Space
from layerfs.check import Check, Finding, Progress
from layerfs.database import Row, State
from layerfs.diff import Written
from layerfs.driver import Change, Driver, Mount, Usage
from layerfs.errors import InvalidArgument
from layerfs.images import Images
from layerfs.layer import Kind, Layer
from layerfs.lifecycle import Lifecycle, check_labels
from layerfs.mounting import Mounting
from layerfs.opening import Wanted, close_session, open_session
from layerfs.recovery import Recovery
from layerfs.session import Session
from layerfs.settling import Settling, Sync
from layerfs.transfer import Transfer
from layerfs.unpacking import BlobLayer, Unpacking

_NO_LABELS: Mapping[str, str] = MappingProxyType({})


class Store:
    """A directory that keeps layers. Use it as a context manager, or call `close`.

    Opening it finishes or undoes what a killed process left half done. Any number of processes and threads may have
    one store open at once.

    Args:
        root: the store's directory; it belongs to the user alone (mode 0700).
        driver: its name; by default that of the store, or for a new store the first that works here.
        options: the driver's settings, for a new store.
        backing: what a new store's data lives on; by default a plain directory, or a sparse file with a file system
            where the driver needs another than there is.
        create: make the store where there is none.
        force: make a backing on a device even if that holds data, which is lost then.
        sync: when data of committed layers is written out; an import always waits for it.
        background: what was being removed when a process ended is taken away in a thread once the store is open, not
            before.

    Raises `NotFound` (there is no store, and it shall not be made), `InvalidArgument` (another driver, another backing,
    a directory that holds something else), `EnvironmentUnfit`, `OutOfSpace`, `KernelRefused`.

    All keys are strings of any characters but the empty one; layers of all kinds share one name space. Where a parent
    is asked for, the name of an image stands for its topmost layer.
    """

    def __init__(
        self,
        root: Path,
        driver: str | None = None,
        *,
        options: Mapping[str, str] = _NO_LABELS,
        backing: BackingSpec | None = None,
        create: bool = True,
        force: bool = False,
        sync: Sync = Sync.COMMIT,
        background: bool = False,
    ) -> None:
        self._session: Session = open_session(Path(root), Wanted(driver, options, backing, force), create=create)
        self._database = self._session.database
        self._mounting = Mounting(self._session)
        self._settling = Settling(self._session, sync)
        self._recovery = Recovery(self._session, self._mounting, self._settling)
        self._transfer = Transfer(self._session, self._mounting)
        self._lifecycle = Lifecycle(self._session, self._mounting, self._recovery, self._transfer)
        self._unpacking = Unpacking(self._session, self._settling)
        self._closed = False
        try:
            self.images = Images(self, self._database, self._session.reserve)
            self._recovery.run(remove=self._lifecycle.remove_later if background else None)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what this object holds; mounts made with `mount` stay. Idempotent.

        Of the data that is to go in a thread, what has not begun to go is left to the next opening.
        """
        if not self._closed:
            self._closed = True
            with ExitStack() as stack:  # from the last to the first, whatever fails
                stack.callback(close_session, self._session)
                stack.callback(self._settling.close)
                stack.callback(self._mounting.release)
                stack.callback(self._lifecycle.close)

    @property
    def root(self) -> Path:
        """The store's directory, without links in its path."""
        return self._session.root

    @property
    def driver(self) -> Driver:
        """The driver, for what can be asked of it; its volumes are the store's own affair."""
        return self._session.driver

    @property
    def backing(self) -> Backing:
        """What the data lives on."""
        return self._session.backing

    # The life of layers

    def prepare(
        self, key: str, parent: str = "", *, labels: Mapping[str, str] = _NO_LABELS, size: int | None = None
    ) -> builtins.list[Mount]:
        """Make a writable layer and return the mounts that show it, without mounting anything.

        Args:
            key: of the new layer.
            parent: a committed layer or an image; ``""`` for a layer that begins empty.
            size: the most bytes that the layer itself may hold.

        Raises `AlreadyExists`, `NotFound` (the parent), `InvalidArgument` (the parent is not committed),
        `EnvironmentUnfit` (a size limit is not to be had here), `OutOfSpace`, `KernelRefused`.
        """
        return self._mounting.described(self._lifecycle.make(key, Kind.ACTIVE, parent, labels, size))

    def view(self, key: str, parent: str = "", *, labels: Mapping[str, str] = _NO_LABELS) -> builtins.list[Mount]:
        """Make a read-only look at a committed layer or image; arguments, result and errors as for `prepare`."""
        return self._mounting.described(self._lifecycle.make(key, Kind.VIEW, parent, labels, None))

    def commit(self, name: str, key: str, *, labels: Mapping[str, str] = _NO_LABELS, digest: bool = True) -> Layer:
        """Finish the writable layer ``key``: it is immutable from now on, called ``name``, and may have children.

        The store's own mounts of it are taken down; whoever mounted it by other means has to unmount it before.

        Args:
            labels: replace those of the active layer.
            digest: compute the diff ID, which reads all that the layer changed, unless it is known already.

        Raises `NotFound`, `AlreadyExists` (the name), `FailedPrecondition` (not active, in use), `OutOfSpace`.
        """
        return self._lifecycle.commit(name, key, labels, digest=digest)

    def remove(self, key: str, *, wait: bool = True) -> None:
        """Remove a layer with the store's own mounts of it.

        Args:
            wait: for its data to be gone. Else the key is free at once, and the data goes in a thread, or when the
                store is opened next; what cannot be taken away then is tried again by `cleanup`.

        Raises `NotFound`, `FailedPrecondition` (it has children, an image stands on it, it is in use).
        """
        self._lifecycle.remove(key, wait=wait)

    # Facts

    def stat(self, key: str) -> Layer:
        """What the store says of a layer. Raises `NotFound`."""
        return self._session.visible(key).layer

    def list(self, *given: str) -> Iterator[Layer]:
        """The layers that any of the filters fits (see `layerfs.filters`), or all, in the order of their making.

        Layers may be made and removed meanwhile. Raises `InvalidArgument` for a filter that cannot be understood.
        """
        fits = filters.parse(given)
        hidden = (State.CREATING, State.REMOVING)
        return (row.layer for row in self._database.rows() if row.state not in hidden and fits(row.layer))

    def update(self, key: str, labels: Mapping[str, str], *fieldpaths: str) -> Layer:
        """Change a layer's labels, the only thing about it that can be changed, and its time of update.

        Args:
            fieldpaths: ``labels`` for all of them (the default), or ``labels.KEY`` for single ones; a label that is
                named there and not in ``labels`` is taken away.

        Raises `NotFound`, `InvalidArgument` (another field).
        """
        check_labels(labels)
        with self._database.transaction():
            row = self._session.visible(key)
            now = dict(row.layer.labels)
            for path in fieldpaths or ("labels",):
                field, _, name = path.partition(".")
                if field != "labels" or path == "labels.":
                    raise InvalidArgument(f"the field {path!r} of the layer {key!r} cannot be changed; labels can")
                if not name:
                    now = dict(labels)
                elif name in labels:
                    now[name] = labels[name]
                else:
                    now.pop(name, None)
            self._database.touch(row.number, now)
        return self._numbered(row)

    def usage(self, key: str) -> Usage:
        """What a layer alone occupies on the backing, without its parents. Raises `NotFound`."""
        row = self._session.visible(key)
        if row.usage is not None:
            return row.usage
        if row.volume is None:  # a view of its parent
            return Usage(0, 0)
        volume, parents = self._session.volumes(row)
        usage = self._session.driver.usage(volume, parents)
        if row.kind is Kind.COMMITTED:
            self._database.change(row.number, size=usage.size, inodes=usage.inodes)
        return usage

    def space(self) -> Space:
        """What is free on the backing, and what there is, in bytes."""
        return self._session.backing.space()

    # Mounts

    def mounts(self, key: str, *, read_only: bool = False) -> builtins.list[Mount]:
        """The mounts that show a layer that is active or a view, without mounting anything.

        An engine that mounts them itself may write to an active layer; a diff ID that was known is forgotten, unless
        the mounts are ``read_only``, as a view's are always.

        Raises `NotFound`, `InvalidArgument` (it is committed).
        """
        row = self._session.visible(key)
        if row.kind is Kind.COMMITTED:
            raise InvalidArgument(f"the layer {key!r} is committed and has no mounts; make a view of it")
        if row.kind is Kind.ACTIVE and not read_only:
            self._session.forget_diff(row)
        return self._mounting.described(row, read_only=read_only)

    def mount(self, key: str, target: Path | None = None) -> Path:
        """Mount a layer, at ``target`` or at a place in the store, and return where. It stays after `close`.

        Mounted several times, it has to be unmounted as often. Raises `NotFound`, `FailedPrecondition` (committed,
        busy, or something else is at ``target``), `InvalidArgument`, `EnvironmentUnfit`, `KernelRefused`.
        """
        return self._mounting.mount(key, target)

    def unmount(self, what: str | Path) -> None:
        """Unmount a layer, named by its key or by where it is mounted.

        Raises `NotFound` where it is not mounted, `FailedPrecondition` naming the processes that use it.
        """
        self._mounting.unmount(what)

    @contextmanager
    def mounted(self, key: str) -> Iterator[Path]:
        """A path at which a layer can be seen within the context. Raises what `mount` and `unmount` do."""
        with self._mounting.mounted(key) as path:
            yield path

    # Contents

    def changes(self, key: str) -> Iterator[Change]:
        """What a layer changes against its parent, in an order that depends on the trees alone. Raises `NotFound`."""
        return self._transfer.changes(key)

    def diff(self, key: str, out: BinaryIO, *, source_date_epoch: int | None = None, digest: bool = True) -> Written:
        """Write what a layer changes as an uncompressed OCI layer tar, and return its diff ID and size.

        A layer that was made of an archive gives that archive's bytes again; otherwise they depend on the trees alone.

        Args:
            source_date_epoch: seconds since the epoch; later times of modification are written as this one.
            digest: without, the diff ID may be empty, and it takes less time.

        Raises `NotFound`, `FailedPrecondition` (busy, or it was written to meanwhile), `Damaged`, `OutOfSpace`.
        """
        return self._transfer.diff(key, out, source_date_epoch=source_date_epoch, digest=digest)

    def apply(
        self,
        key: str,
        stream: BinaryIO,
        *,
        devices: bool = False,
        verified: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Applied:
        """Apply an OCI layer tar (plain, gzip or zstd) to a writable layer that is not mounted: all of it or nothing.

        Args:
            devices: also make devices beyond those that every container has.
            verified: the caller compares the diff ID with a known one; see `layerfs.apply.apply`.
            progress: is called with the number of further bytes of ``stream`` that were read.

        Raises `NotFound`, `FailedPrecondition` (not active, mounted, busy), `BadLayer` naming the entry, `OutOfSpace`.
        """
        return self._transfer.apply(key, stream, devices=devices, verified=verified, progress=progress)

    def unpack(self, layers: Sequence[BlobLayer], *, devices: bool = False) -> None:
        """Make the committed layers of an image, bottom up, under their chain IDs; those that are there stay.

        Raises `BadLayer` (an archive is bad, or its diff ID is another), `AlreadyExists` (a layer of another content
        has the key), `FailedPrecondition` (a layer that they stand on was removed meanwhile), `Damaged` (one that is
        there is in doubt, see `Sync`), `OutOfSpace`. None of the layers is made then.
        """
        self._unpacking.unpack(layers, devices=devices)

    # Upkeep

    def cleanup(self) -> builtins.list[str]:
        """Finish or undo what other processes, or operations that failed, left; a sentence for each thing done.

        Waits for the data of layers that were removed.
        """
        self._lifecycle.wait()
        return self._recovery.run(given_up=True)

    def check(self, *, repair: bool = False, progress: Progress | None = None) -> builtins.list[Finding]:
        """Find damaged, orphaned and half-made layers; committed ones are verified against their diff IDs.

        With ``repair``, put right what can be put right without losing data; each `Finding` says so.
        """
        return self._checker().run(repair=repair, progress=progress)

    def collect_garbage(self) -> builtins.list[str]:
        """Take away what nothing needs: leftovers of work broken off, layers that only removed images had.

        Returns a sentence for each thing.
        """
        return self._checker().collect()

    def _checker(self) -> Check:
        return Check(self._session, self._mounting, self._settling, self._recovery, self._transfer, self.images)

    def _numbered(self, row: Row) -> Layer:
        now = self._database.numbered(row.number)
        assert now is not None
        return now.layer
