"""Opening and closing a store: its directory, its settings, its backing and the list of sessions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from layerfs import registry
from layerfs.backing import DIRECTORY, Backing, BackingSpec
from layerfs.database import Database
from layerfs.driver import Driver
from layerfs.errors import (
    EnvironmentUnfit,
    FailedPrecondition,
    InvalidArgument,
    LayerfsError,
    NotFound,
    OutOfSpace,
    refused,
)
from layerfs.locks import SETUP, LockFile
from layerfs.probing import filesystem_of, nearest
from layerfs.reserve import Reserve
from layerfs.session import Session

_DATABASE, _LOCK, _RESERVE = "layerfs.db", "lock", "reserve"

_PREFERRED = ("overlay2", "btrfs", "vfs")
"""Which driver a new store gets when none is named: the first that works."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What the caller of `open_session` asks for; None and {} stand for what the store has, or a default."""

    driver: str | None
    options: Mapping[str, str]
    backing: BackingSpec | None
    force: bool = False
    """Make the backing even if its device holds data."""


def open_session(root: Path, wanted: Wanted, *, create: bool) -> Session:
    """Open the store at ``root``, or make one. See `layerfs.store.Store` for what it raises."""
    root = Path(os.path.realpath(root))
    if wanted.driver:
        registry.load(wanted.driver)  # before anything is made for a name that is mistyped
    try:
        _enter(root, create=create)
        locks = LockFile(root / _LOCK)
    except OSError as error:
        raise refused(f"opening the store {str(root)!r}", error) from error
    try:
        with locks.exclusive(SETUP):
            return _open(root, locks, wanted, create=create)
    except BaseException:
        locks.close()
        raise


def close_session(session: Session) -> None:
    """End a session; the last one takes the backing down, where nothing uses it.

    What the session has not finished stays its own: whoever opens the store next finds an owner that lives no more.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(session.locks.close)  # whatever fails here, the session lives no more
        stack.callback(session.database.close)
        session.driver.close()
        stack.enter_context(session.locks.exclusive(SETUP))
        others = [number for number in session.database.sessions() if number != session.number]
        if not any(map(session.locks.is_held, others)):
            with contextlib.suppress(FailedPrecondition):  # something of it is mounted: a later session takes it down
                session.backing.down()
        with contextlib.suppress(OutOfSpace):  # whoever opens the store next does it
            session.database.end_session(session.number)


def _enter(root: Path, *, create: bool) -> None:
    """See to it that ``root`` is the directory of a store, or will be."""
    if (root / _DATABASE).exists():
        return
    if not create:
        raise _no_store(root)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if set(os.listdir(root)) - {_LOCK} and not (root / _DATABASE).exists():
        raise InvalidArgument(f"{str(root)!r} is neither empty nor a store; choose another directory")
    root.chmod(0o700)


def _no_store(root: Path) -> NotFound:
    return NotFound(f"there is no store at {str(root)!r}; make one with `layerfs init`")


def _open(root: Path, locks: LockFile, wanted: Wanted, *, create: bool) -> Session:
    reserve = Reserve(root / _RESERVE)
    reserve.use()
    database = Database(root / _DATABASE)
    try:
        if database.fact("driver") is None:
            try:
                if not create:  # what is there was left half made
                    raise _no_store(root)
                _make(root, database, wanted)
            except BaseException:
                if database.fact("driver") is None:
                    database.discard()
                raise
        kind, options = _settings(root, database, wanted)
        backing = Backing(root)
        backing.up()
        driver = kind(backing.path, options)
        with database.transaction():
            number = database.begin_session(os.getpid())
            locks.hold(number)
        reserve.hold()
        return Session(root, number, locks, database, backing, driver, reserve)
    except BaseException:
        database.close()
        raise


def _make(root: Path, database: Database, wanted: Wanted) -> None:
    """Make a store; what another process left half made is made anew."""
    kind = registry.load(wanted.driver) if wanted.driver else _default(root)
    if wanted.backing is None:
        _check_usable(kind, root)
    spec = wanted.backing or _default_backing(kind, root)
    with contextlib.suppress(NotFound):
        Backing(root).destroy()  # a killed process's, which may be of another kind
    backing = Backing.create(root, spec, force=wanted.force)
    try:
        backing.up()
        if wanted.backing is not None:
            _check_usable(kind, backing.path)
        kind(backing.path, wanted.options).close()
        for name in ("records", "mnt"):
            (root / name).mkdir(mode=0o700, exist_ok=True)
    except BaseException:
        backing.destroy()
        raise
    with database.transaction():
        database.set_fact("options", json.dumps(dict(wanted.options)))
        database.set_fact("driver", kind.name)


def _settings(root: Path, database: Database, wanted: Wanted) -> tuple[type[Driver], dict[str, str]]:
    """The driver and the options of an existing store. Raises `InvalidArgument` where others are wanted."""
    name = database.fact("driver") or ""
    options = dict(json.loads(database.fact("options") or "{}"))
    for what, given, found in (("driver", wanted.driver, name), ("options", dict(wanted.options), options)):
        if given and given != found:
            raise InvalidArgument(f"the store {str(root)!r} has the {what} {found!r}, not {given!r}; leave that out")
    if wanted.backing is not None:
        has = Backing(root).spec
        if (wanted.backing.filesystem, wanted.backing.device) != (has.filesystem, has.device):
            raise InvalidArgument(f"the store {str(root)!r} has a backing of kind {has.filesystem!r}; leave that out")
    return registry.load(name), options


def _default(root: Path) -> type[Driver]:
    reasons = []
    for name in _PREFERRED:
        try:
            kind = registry.load(name)
            _check_usable(kind, root)
        except LayerfsError as error:
            reasons.append(str(error))
        else:
            return kind
    raise EnvironmentUnfit(f"no driver works here: {'; '.join(reasons)}")


def _check_usable(kind: type[Driver], root: Path) -> None:
    probe = kind.probe(root)
    if not probe.usable:
        raise EnvironmentUnfit(f"the driver {kind.name!r} does not work here: {probe.reason}; {probe.remedy}")


def _default_backing(kind: type[Driver], root: Path) -> BackingSpec:
    filesystems = kind.needs.filesystems
    if not filesystems or filesystem_of(nearest(root)) in filesystems:
        return BackingSpec(DIRECTORY)
    return BackingSpec(filesystems[0])
