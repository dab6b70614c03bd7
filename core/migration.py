"""Copies a store into another one, on another driver: layers of every kind, their labels, and images.

Every layer's diff is read from one store and applied in the other, whose digest of it has to be the layer's diff ID. A
layer is there whole or not at all, and what is there is not copied again, so that a migration that was broken off goes
on where it was. The source is only read.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from layerfs.driver import Capability
from layerfs.errors import AlreadyExists, Damaged, InvalidArgument, LayerfsError
from layerfs.layer import Kind, Layer
from layerfs.store import Store

_UNFINISHED: Final = "layerfs.unfinished-copy"
"""A label of layers in the new store that are not whole yet."""

Progress = Callable[[int, int, str], object]
"""Is called with layers done, layers in all, and the key of the layer that is copied."""


def migrate(source: Store, target: Store, progress: Progress | None = None) -> None:
    """Copy everything from ``source`` to ``target``, and check all of it there.

    Raises `AlreadyExists` where ``target`` has another layer or image of a name, `Damaged` where a layer is not what
    its diff ID says, on either side, `FailedPrecondition` where a layer of ``source`` is busy, `InvalidArgument` where
    both are one store, `OutOfSpace`.
    """
    check_apart(source.root, target.root)
    layers = list(source.list())
    with target.images.coming():
        for done, layer in enumerate(layers):
            if progress is not None:
                progress(done, len(layers), layer.key)
            _copy(source, target, layer)
        for image in source.images.list():
            target.images.put(image.name, *source.images.documents(image.name))
    if progress is not None:
        progress(len(layers), len(layers), "checking")
    if wrong := target.check():
        first = wrong[0]
        raise Damaged(f"the copy of {first.name!r} is not right: {first.what}; remove the new store and try again")


def check_apart(source: Path, target: Path) -> None:
    """Raise `InvalidArgument` where two stores' directories are one, by whatever path; ``target`` need not be there."""
    with contextlib.suppress(FileNotFoundError):
        if source.samefile(target):
            raise InvalidArgument(f"{str(target)!r} is the store itself; choose another directory for the new one")


def _copy(source: Store, target: Store, layer: Layer) -> None:
    present = {found.key: found for found in target.list()}.get(layer.key)
    if present is not None and _UNFINISHED in present.labels:
        target.remove(layer.key)
    elif present is not None:
        same_diff = present.diff_id == layer.diff_id or not layer.diff_id
        if not same_diff or (present.kind, present.parent) != (layer.kind, layer.parent):
            raise AlreadyExists(f"the new store has another layer {layer.key!r}; remove it, or choose another store")
        return
    if layer.kind is Kind.VIEW:
        target.view(layer.key, layer.parent, labels=layer.labels)
        return
    making = layer.key if layer.kind is Kind.ACTIVE else f"{_UNFINISHED} of {layer.key}"
    if making != layer.key and any(found.key == making for found in target.list()):
        target.remove(making)
    limited = Capability.SIZE_LIMIT in target.driver.capabilities
    size = layer.size_limit if limited else None
    target.prepare(making, layer.parent, labels={**layer.labels, _UNFINISHED: "yes"}, size=size)
    with _diff(source, layer.key) as stream:
        found = target.apply(making, stream, devices=True, verified=bool(layer.diff_id)).diff_id
    if layer.diff_id and found != layer.diff_id:
        raise Damaged(f"the layer {layer.key!r} has the diff ID {found}, but should have {layer.diff_id}")
    if layer.kind is Kind.ACTIVE:
        target.update(layer.key, layer.labels)
    else:
        target.commit(layer.key, making, labels=layer.labels, digest=bool(layer.diff_id))


@contextmanager
def _diff(store: Store, key: str) -> Iterator[BinaryIO]:
    """A layer's diff, written by a thread while it is read. What goes wrong there is raised here."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    problem: list[BaseException] = []

    def write() -> None:
        try:
            with open(writer, "wb", buffering=1 << 18) as out:
                store.diff(key, out)
        except BrokenPipeError:
            pass
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=write, name="diff")
    thread.start()
    try:
        with open(reader, "rb", buffering=0) as stream:
            yield stream
    except LayerfsError:
        thread.join()
        if problem:  # an archive that is cut off says less than why it is
            raise problem[0] from None
        raise
    finally:
        thread.join()
    if problem:
        raise problem[0]
