"""Docker's graph-driver plugin calls on a store.

Docker's layers have no kinds: any of them is written to, until a tar is applied to it or another is made on top of it.
Until then it is an active one, and from then on committed. An active layer has the key ``ID (writable)``, a committed
one ``ID``, and ``ID (shown)`` is the view by which Docker sees a committed one.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final
from weakref import WeakValueDictionary

from layerfs.changes import compare
from layerfs.diff import write_diff
from layerfs.driver import Change, ChangeKind
from layerfs.errors import AlreadyExists, InvalidArgument, LayerfsError, NotFound
from layerfs.layer import Kind, Layer
from layerfs.sizes import parse_size
from layerfs.store import Store

_KINDS: Final = {ChangeKind.MODIFIED: 0, ChangeKind.ADDED: 1, ChangeKind.DELETED: 2}


class GraphDriver:
    """The calls of one Docker daemon, from any number of threads; those about one layer wait for each other."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._locks: WeakValueDictionary[str, threading.RLock] = WeakValueDictionary()  # those that are held or awaited
        self._guard = threading.Lock()

    # Calls with an answer in JSON, by the name that follows ``/GraphDriver.`` in the protocol

    def init(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Docker begins. Its own settings for the driver are none of ours, and user namespaces are refused."""
        if options := request.get("Opts"):
            raise InvalidArgument(f"the driver has no storage options, and so no {options[0]!r}; set them at its store")
        if request.get("UIDMaps") or request.get("GIDMaps"):
            raise InvalidArgument("the driver does not remap users; start dockerd without --userns-remap")
        return {}

    def capabilities(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        """A layer that was made of an archive gives its bytes again, so that Docker need not keep their record."""
        return {"Capabilities": {"ReproducesExactDiffs": True}}

    def create(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Make a layer."""
        key, parent = _id(request), str(request.get("Parent") or "")
        options = dict(request.get("StorageOpt") or {})
        size = parse_size(options.pop("size")) if "size" in options else None
        if options:
            raise InvalidArgument(f"there is no storage option {next(iter(options))!r}; there is size")
        if parent:
            self._finish(parent)
        with self._locked(key):
            if self._exists(key):
                raise AlreadyExists(f"there is already a layer {key!r}")
            self._store.prepare(_writable(key), parent, size=size)
        return {}

    createreadwrite = create

    def remove(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Remove a layer; one that is not there is no error."""
        key = _id(request)
        with self._locked(key):
            for name in (_shown(key), _writable(key), key):
                with contextlib.suppress(NotFound):
                    self._store.remove(name)
        return {}

    def get(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Mount a layer; as often as this is called, `put` has to be."""
        key = _id(request)
        with self._locked(key):
            layer = self._layer(key)
            name = layer.key
            if layer.kind is Kind.COMMITTED:
                name = _shown(key)
                with contextlib.suppress(AlreadyExists):
                    self._store.view(name, key)
            return {"Dir": str(self._store.mount(name))}

    def put(self, request: Mapping[str, Any], begun: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Unmount a layer; one that is not mounted is no error.

        ``begun`` is called when other calls about the layer have to wait for this one, and so nobody else need do so:
        the kernel takes its time, and Docker does nothing about a refusal.
        """
        key = _id(request)
        with self._locked(key), contextlib.suppress(NotFound):
            layer = self._layer(key)
            begun()
            self._store.unmount(_shown(key) if layer.kind is Kind.COMMITTED else layer.key)
        return {}

    def exists(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Whether a layer is there."""
        return {"Exists": self._exists(_id(request))}

    def status(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        """What ``docker info`` shows."""
        space = self._store.space()
        facts = {"Driver": self._store.driver.name, "Store": str(self._store.root), **self._store.driver.status()}
        facts |= {"Bytes free": str(space.free), "Bytes in all": str(space.total)}
        return {"Status": [[name, text] for name, text in facts.items()]}

    def getmetadata(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What ``docker inspect`` shows of a layer."""
        layer = self._layer(_id(request))
        return {"Metadata": {"Driver": self._store.driver.name, "Store": str(self._store.root), "Key": layer.key}}

    def cleanup(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        """Docker ends: unmount what is mounted, and finish what was broken off. What stays mounted is told at last."""
        stayed = []
        for layer in list(self._store.list("kind!=committed")):
            try:
                while True:
                    self._store.unmount(layer.key)
            except NotFound:
                continue
            except LayerfsError as error:
                stayed.append(str(error))
        self._store.cleanup()
        if stayed:
            raise LayerfsError("; ".join(stayed))
        return {}

    def changes(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a layer changes against its parent, or against another layer.

        Docker wants a directory in which something changed to be among it, whatever its own times are.
        """
        found: dict[bytes, int] = {}
        with self._compared(request) as (changes, _):
            for change in changes:
                parts = change.path.split(b"/")
                for depth in range(1, len(parts)):
                    found.setdefault(b"/".join(parts[:depth]), _KINDS[ChangeKind.MODIFIED])
                found[change.path] = _KINDS[change.kind]
        found.pop(b"", None)
        listed = ({"Path": "/" + path.decode(errors="replace"), "Kind": kind} for path, kind in found.items())
        return {"Changes": list(listed)}

    def diffsize(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The bytes of the files that a layer changes."""
        with self._compared(request) as (changes, tree):
            return {"Size": _size(changes, tree)}

    # Calls with a tar

    def diff(self, request: Mapping[str, Any], out: BinaryIO) -> None:
        """Write what a layer changes as a tar."""
        key = _id(request)
        with self._locked(key):
            layer = self._layer(key)
            if layer.parent == _parent(request):
                self._store.diff(layer.key, out, digest=False)
                return
            with self._compared(request) as (changes, tree):
                write_diff(changes, tree, out, digest=False)

    def applydiff(self, key: str, tar: BinaryIO) -> dict[str, Any]:
        """Apply a tar to a layer; the bytes of the files in it.

        It may hold any device, and lack its end mark, as with Docker's own drivers: Docker knows the diff ID.
        """
        with self._locked(key):
            layer = self._layer(key)
            self._store.apply(layer.key, tar, devices=True, verified=True)
            self._finish(key)  # looking at an active one would make the store forget its archive
            with self._compared({"ID": key, "Parent": layer.parent}) as (changes, tree):
                return {"Size": _size(changes, tree)}

    # Layers

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with self._guard:
            lock = self._locks.setdefault(key, threading.RLock())
        with lock:
            yield

    def _layer(self, key: str) -> Layer:
        """A layer in whatever form. Raises `NotFound`."""
        with contextlib.suppress(NotFound):
            return self._store.stat(_writable(key))
        return self._store.stat(key)

    def _exists(self, key: str) -> bool:
        try:
            self._layer(key)
        except NotFound:
            return False
        return True

    def _finish(self, key: str) -> None:
        """Make a layer one that can be a parent, which nobody writes to any more."""
        if self._layer(key).kind is Kind.COMMITTED:  # it stays so, and need not wait for a diff of it
            return
        with self._locked(key):
            if self._layer(key).kind is Kind.ACTIVE:
                self._store.commit(key, _writable(key), digest=False)

    @contextmanager
    def _compared(self, request: Mapping[str, Any]) -> Iterator[tuple[Iterator[Change], int]]:
        """What a layer changes against the one that the request calls its parent, and a descriptor of its tree."""
        key, parent = _id(request), _parent(request)
        with self._locked(key), ExitStack() as stack:
            layer = self._layer(key)
            if layer.parent == parent:
                changes = list(self._store.changes(layer.key))  # the layer is busy until all are read
                yield iter(changes), self._tree(key, stack)
                return
            old = self._tree(parent, stack) if parent else None
            tree = self._tree(key, stack)
            yield compare(old, tree), tree

    def _tree(self, key: str, stack: ExitStack) -> int:
        """A descriptor of a layer's tree, mounted for as long as ``stack`` is open."""
        place = Path(self.get({"ID": key})["Dir"])
        stack.callback(self.put, {"ID": key})
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return fd


def _id(request: Mapping[str, Any]) -> str:
    key = request.get("ID")
    if not isinstance(key, str) or not key:
        raise InvalidArgument("the request names no layer (ID)")
    return key


def _parent(request: Mapping[str, Any]) -> str:
    return str(request.get("Parent") or "")


def _writable(key: str) -> str:
    return f"{key} (writable)"


def _shown(key: str) -> str:
    return f"{key} (shown)"


def _size(changes: Iterator[Change], tree: int) -> int:
    """The bytes of the regular files that were added or modified, each once whatever its names are."""
    size = 0
    seen: set[int] = set()
    for change in changes:
        if change.kind is ChangeKind.DELETED or not change.path:
            continue
        with contextlib.suppress(FileNotFoundError):  # a running container has removed it
            info = os.stat(change.path, dir_fd=tree, follow_symlinks=False)
            if stat.S_ISREG(info.st_mode) and info.st_ino not in seen:
                seen.add(info.st_ino)
                size += info.st_size
    return size
