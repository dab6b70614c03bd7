"""The mounts that the store itself makes, and the book of who needs them.

A layer has one mount of its own, ``mnt/NUMBER``; wherever else it is wanted, that one is bound, so that no upper
directory is ever mounted twice. Each user of a mount is a row in the database, written before the mount is made and
deleted after it is gone. The mount goes with its last user.

A row counts only in the mount namespace that it was made in. Of other namespaces nothing can be seen but whether a
process still lives in them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerfs import mount_table, mounts
from layerfs.database import MountRow, Row
from layerfs.driver import Mount
from layerfs.errors import FailedPrecondition, InvalidArgument, LayerfsError, NotFound
from layerfs.layer import Kind
from layerfs.locks import layer_byte
from layerfs.session import Session, numbered

_OWN = ""
"""The target of a user of the layer's own place."""


class Mounting:
    """Mounts layers for one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._database = session.database

    def described(self, row: Row, *, read_only: bool = False) -> list[Mount]:
        """The mounts that show a layer, for whoever mounts it."""
        volume, parents = self._session.volumes(row)
        return self._session.driver.mounts(volume, parents, read_only=read_only or row.kind is not Kind.ACTIVE)

    def mount(self, key: str, target: Path | None) -> Path:
        """Add a user that stays until `unmount`."""
        if target is None:
            return self._add(key, _OWN, None)
        if not target.is_dir():
            try:
                target.mkdir()
            except OSError as error:
                raise InvalidArgument(f"{str(target)!r} is no directory to mount on: {error.strerror}") from error
        return self._add(key, os.path.realpath(target), None)

    @contextmanager
    def mounted(self, key: str) -> Iterator[Path]:
        """Add a user that goes with the context, or with the process."""
        path = self._add(key, _OWN, self._session.number)
        try:
            yield path
        finally:
            self._drop_own(path)

    def unmount(self, what: str | Path) -> None:
        """Drop a user: of a layer's own place, or at a target; of a layer without the former, all of the latter."""
        layer, target = self._meant(what)
        if layer is not None:
            with self._session.locks.exclusive(layer_byte(layer)):
                users = [user for user in self._living(layer) if user.session is None]
                own = [user for user in users if user.target == (_OWN if target is None else target)][:1]
                chosen = own or (users if target is None else [])
                for user in chosen:
                    self._drop(user)
                if chosen:
                    return
        raise NotFound(f"{str(what)!r} is neither a mounted layer nor a place where one is mounted")

    @contextmanager
    def opened(self, row: Row) -> Iterator[int]:
        """A directory descriptor of a layer's tree, by its own mount or else one that has no place in the file tree."""
        place = self._session.place(row.number)
        if row.kind is Kind.ACTIVE and self._is_mounted(place):
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                yield fd
            finally:
                os.close(fd)
            return
        volume, parents = self._session.volumes(row)
        with mounts.opened(self._session.driver.mounts(volume, parents, read_only=True)) as fd:
            yield fd

    def check_unused(self, row: Row) -> None:
        """Refuse with `FailedPrecondition` where the layer is mounted by the store."""
        with self._session.locks.exclusive(layer_byte(row.number)):
            if self._living(row.number):
                raise FailedPrecondition(f"the layer {row.key!r} is mounted; unmount it first")

    def take_down(self, row: Row) -> None:
        """Unmount a layer wherever the store has mounted it.

        Raises `FailedPrecondition` where a process needs it: one that uses `mounted`, or has files open.
        """
        with self._session.locks.exclusive(layer_byte(row.number)):
            users = self._living(row.number)
            for user in users:
                if user.session is not None:
                    who = self._database.sessions().get(user.session, "?")
                    raise FailedPrecondition(f"the layer {row.key!r} is in use: process {who} has it mounted")
                self._check_here(row, user)
            for user in sorted(users, key=lambda user: user.target == _OWN):
                self._drop(user)
            self._unmount_place(row.number)

    def tidy(self) -> list[str]:
        """Drop users that are gone and mounts that nobody uses any more; what was unmounted, for people."""
        done = []
        places = filter(None, map(numbered, os.listdir(self._session.places)))
        for layer in {user.layer for user in self._database.mounts()}.union(places):
            with self._session.locks.tried(layer_byte(layer)) as held:
                if not held or self._living(layer):
                    continue
                place = self._session.place(layer)
                was_mounted = self._is_mounted(place)
                with contextlib.suppress(LayerfsError):  # a process is still in it: the next time, then
                    self._unmount_place(layer)
                    if was_mounted:
                        done.append(f"unmounted {str(place)!r}, which nobody used any more")
        return done

    def release(self) -> None:
        """Drop the users that go with this session."""
        for user in self._database.mounts():
            if user.session == self._session.number:
                with self._session.locks.exclusive(layer_byte(user.layer)):
                    self._drop(user)

    # Users

    def _add(self, key: str, target: str, session: int | None) -> Path:
        number = self._session.idle(key).number
        with self._session.locks.exclusive(layer_byte(number)):
            row = self._session.idle(key)
            if row.kind is Kind.COMMITTED:
                raise FailedPrecondition(f"the layer {key!r} is committed and cannot be mounted; make a view of it")
            self._check_free(row, target)
            if row.kind is Kind.ACTIVE:
                self._session.forget_diff(row)
            user = self._database.add_mount(row.number, target, session, _namespace())
            try:
                place = self._mounted_place(row)
                if target != _OWN and len(self._database.mounted_at(target)) == 1:
                    options = ("bind", "rw" if row.kind is Kind.ACTIVE else "ro")
                    mounts.attach([Mount("bind", str(place), options)], Path(target))
            except BaseException:
                self._database.delete_mount(user)
                if not self._database.mounts(row.number):
                    with contextlib.suppress(LayerfsError):
                        self._unmount_place(row.number)
                raise
            return place if target == _OWN else Path(target)

    def _check_free(self, row: Row, target: str) -> None:
        """Refuse a second mount of one upper directory, and a second layer at one target."""
        for user in self._living(row.number):
            if row.kind is Kind.ACTIVE:
                self._check_here(row, user)
        for user in self._database.mounted_at(target) if target != _OWN else ():
            if user.layer != row.number:
                if self._is_alive(user):
                    raise FailedPrecondition(f"another layer is mounted at {target!r}; unmount that first")
                self._database.delete_mount(user.number)

    def _check_here(self, row: Row, user: MountRow) -> None:
        if user.namespace != _namespace():
            raise FailedPrecondition(f"the layer {row.key!r} is mounted in another mount namespace; unmount it there")

    def _meant(self, what: str | Path) -> tuple[int | None, str | None]:
        """The layer that `unmount` is about, and the target where that is the name of one."""
        if isinstance(what, str) and (row := self._database.find(what)) is not None:
            return row.number, None
        path = Path(os.path.realpath(what))
        if path.parent == self._session.places:
            return numbered(path.name), _OWN
        users = [user for user in self._database.mounted_at(str(path)) if self._is_alive(user)]
        return (users[0].layer, str(path)) if users else (None, None)

    def _drop_own(self, place: Path) -> None:
        """Drop the user that `mounted` added."""
        number = numbered(place.name)
        assert number is not None
        with self._session.locks.exclusive(layer_byte(number)):
            for user in self._database.mounts(number):
                if user.session == self._session.number:
                    self._drop(user)
                    return

    def _drop(self, user: MountRow) -> None:
        """Forget a user, after unmounting what nobody else uses. The layer's byte is held."""
        self._session.reserve.use()
        others = [other for other in self._database.mounts(user.layer) if other.number != user.number]
        if user.target != _OWN and all(other.target != user.target for other in others):
            self._unmount_target(user)
        if not others:
            self._unmount_place(user.layer)
        self._database.delete_mount(user.number)

    def _living(self, layer: int) -> list[MountRow]:
        """The users of a layer that are not gone; the others are forgotten. The layer's byte is held."""
        living = []
        for user in self._database.mounts(layer):
            if self._is_alive(user):
                living.append(user)
            else:
                self._database.delete_mount(user.number)
        return living

    def _is_alive(self, user: MountRow) -> bool:
        others = user.session if user.session != self._session.number else None
        if others is not None and not self._session.locks.is_held(others):
            return False
        if user.namespace != _namespace():
            return _exists(user.namespace)
        return self._is_mounted(self._session.place(user.layer)) if user.target == _OWN else self._is_bound(user)

    # Mounts

    def _mounted_place(self, row: Row) -> Path:
        place = self._session.place(row.number)
        place.mkdir(mode=0o700, exist_ok=True)
        if not self._is_mounted(place):
            mounts.attach(self.described(row), place)
        return place

    def _unmount_place(self, layer: int) -> None:
        place = self._session.place(layer)
        if self._is_mounted(place):
            mounts.unmount(place)
        with contextlib.suppress(FileNotFoundError):
            place.rmdir()

    def _unmount_target(self, user: MountRow) -> None:
        if self._is_bound(user):
            mounts.unmount(Path(user.target))

    def _is_mounted(self, place: Path) -> bool:
        """Whether something is mounted at a layer's own place."""
        try:
            return mount_table.mount_of(place) != mount_table.mount_of(place.parent)
        except FileNotFoundError:
            return False

    def _is_bound(self, user: MountRow) -> bool:
        """Whether what is mounted at the user's target is the layer's mount."""
        tops = {str(point.target): point for point in mount_table.read()}
        own, there = tops.get(str(self._session.place(user.layer))), tops.get(user.target)
        return own is not None and there is not None and (own.device, own.root) == (there.device, there.root)


def _namespace() -> int:
    return os.stat("/proc/self/ns/mnt").st_ino


def _exists(namespace: int) -> bool:
    """Whether a process that this one may look at lives in the mount namespace."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}/ns/mnt").st_ino == namespace:
                return True
    return False
