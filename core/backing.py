"""What a driver's data lives on: made on a sparse file or a given device, brought up, grown, taken down.

A backing has a root directory, where it keeps::

    backing.json   what it is, written before anything is made
    backing.lock   held during each operation, so that several processes can call them at once
    data/          where it is to be used: the file system's mount point, or a plain directory

and what its kind needs beside them, such as the sparse file. The kinds are in `layerfs.backings`; here is what they
have in common. `Backing.create`, `Backing.up`, `Backing.down` and `Backing.destroy` finish what a killed process began.

A driver finds the backing that its root directory lies on by `Backing.around`, and there `Backing.facts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from layerfs import backings
from layerfs.backings import places
from layerfs.backings.kind import DIRECTORY, BackingSpec, Kind, Space
from layerfs.errors import AlreadyExists, FailedPrecondition, NotFound
from layerfs.treecopy import remove_tree

__all__ = ["DIRECTORY", "FILESYSTEMS", "Backing", "BackingSpec", "Space"]

FILESYSTEMS = tuple(backings.KINDS)
"""What `BackingSpec.filesystem` can be."""

_STATE, _LOCK, _DATA = "backing.json", "backing.lock", "data"


@dataclass(slots=True)
class _State:
    """The contents of ``backing.json``: the spec, and how far the making has come."""

    spec: BackingSpec
    uuid: str
    made: bool


class Backing:
    """One backing under one root directory.

    Args:
        root: the directory where `create` made it. Raises `NotFound` where there is none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._state = self._load()

    @property
    def spec(self) -> BackingSpec:
        """What it is; ``size`` is the present one of a sparse file."""
        return self._state.spec

    @property
    def path(self) -> Path:
        """The directory for data; it can be used after `up`."""
        return self.root / _DATA

    @property
    def facts(self) -> dict[str, str]:
        """What a driver has to know to use it, such as the name of a pool; each kind says which there are."""
        return self._kind.facts()

    @classmethod
    def around(cls, path: Path) -> Backing | None:
        """The backing whose data directory holds the directory ``path``; None where there is no such backing."""
        path = Path(os.path.realpath(path))
        for place in (path, *path.parents):
            if place.name == _DATA and (place.parent / _STATE).exists():
                return cls(place.parent)
        return None

    @classmethod
    def create(cls, root: Path, spec: BackingSpec, *, force: bool = False) -> Backing:
        """Make a backing in the directory ``root``, which is made too (mode 0700); one of the same kind may be there.

        A device that has anything on it is refused with `FailedPrecondition` unless ``force`` is set, one in use
        always. Raises `InvalidArgument` for a spec that cannot be, `AlreadyExists` where another kind is there,
        `EnvironmentUnfit` for a missing package or privilege, `OutOfSpace`.
        """
        backings.kind_of(spec.filesystem).validate(spec)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(root):
            try:
                state = _read_state(root)
            except FileNotFoundError:
                state = _State(spec, str(uuid.uuid4()), made=False)
            if _identity(state.spec) != _identity(spec):
                raise AlreadyExists(
                    f"{str(root)!r} has a backing of kind {state.spec.filesystem!r} already; destroy that first"
                )
            if not state.made:
                state.spec = spec
                _make(root, state, force=force)
        return cls(root)

    def up(self) -> None:
        """Make `path` usable: attach, start and mount what it takes. Up already is no error."""
        with _locked(self.root):
            if not self._state.made:
                raise FailedPrecondition(f"the backing in {str(self.root)!r} is half made; create it again")
            self.path.mkdir(mode=0o700, exist_ok=True)
            if not self._kind.is_up():
                self._kind.up()

    def down(self) -> None:
        """Undo `up`; the data stays. Down already is no error.

        Raises `FailedPrecondition` naming what uses it.
        """
        with _locked(self.root):
            self._kind.down()

    def grow(self, size: int) -> None:
        """Make a sparse file ``size`` bytes large, or use all of a device that has grown (``size`` is then ignored).

        Raises `InvalidArgument` for less than there is now.
        """
        with _locked(self.root):
            self._grow(size)

    def extend(self) -> None:
        """Make a sparse file larger where what is on it is about to be full, if its kind grows by itself.

        Cheap where there is nothing to do. Also finishes what a killed process left of that.
        """
        if self._kind.outgrown() is None:
            return
        with _locked(self.root):
            if (size := self._kind.outgrown()) is not None:
                self._grow(size)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the context, nobody makes the backing larger, or takes it down or up. Not to be nested."""
        with _locked(self.root):
            yield

    def failures(self) -> int:
        """How often writes have failed for want of space since it was made, where its kind keeps count."""
        with _locked(self.root):
            return self._kind.failures()

    def destroy(self) -> None:
        """Take it down and delete it with all its data; a device loses its signature.

        Raises `FailedPrecondition` naming what uses it. Destroyed already is no error.
        """
        if not self.root.exists():
            return
        with _locked(self.root):
            self._kind.down()
            self._kind.erase()
            with places.directory(self.root) as fd:
                for name in (_DATA, *self._kind.files, _STATE, _LOCK):
                    remove_tree(fd, name)

    def space(self) -> Space:
        """What is free and what there is, for a sparse file no more than the file system below has. It must be up."""
        return self._kind.space()

    def _grow(self, size: int) -> None:
        self._state = self._load()
        self._state.spec = self._kind.enlarge(size)
        _write_state(self.root, self._state)
        self._kind.grow()

    @property
    def _kind(self) -> Kind:
        return _kind(self.root, self._state)

    def _load(self) -> _State:
        try:
            return _read_state(self.root)
        except FileNotFoundError as error:
            raise NotFound(f"{str(self.root)!r} has no backing; make one first") from error


def _identity(spec: BackingSpec) -> tuple[str, str | None, str | None]:
    """What cannot be different in two specs of one backing."""
    return spec.filesystem, spec.device, spec.metadata_device


def _kind(root: Path, state: _State) -> Kind:
    return backings.kind_of(state.spec.filesystem)(root, state.spec, state.uuid)


def _make(root: Path, state: _State, *, force: bool) -> None:
    """Make what ``state`` says; where that fails, nothing is left of it."""
    state.spec = _kind(root, state).prepare(force=force)
    kind = _kind(root, state)
    _write_state(root, state)
    try:
        kind.make()
    except BaseException:
        with contextlib.suppress(Exception), places.directory(root) as fd:  # what is left is destroyed later
            kind.erase()
            for name in (*kind.files, _STATE):
                remove_tree(fd, name)
        raise
    state.made = True
    _write_state(root, state)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with places.opened(root / _LOCK, os.O_RDWR | os.O_CREAT) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a process that another thread has forked meanwhile has the descriptor too


def _read_state(root: Path) -> _State:
    raw = json.loads((root / _STATE).read_text())
    return _State(BackingSpec(**raw["spec"]), raw["uuid"], raw["made"])


def _write_state(root: Path, state: _State) -> None:
    places.write_whole(root / _STATE, json.dumps(dataclasses.asdict(state)))
