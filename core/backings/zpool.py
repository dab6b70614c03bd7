"""A ZFS pool on a sparse file or a given device, with OpenZFS or, where that is what is installed, with zfs-fuse.

The pool is called ``layerfs-`` and the backing's UUID, and no list of pools remembers it: it is imported when it is
brought up, and exported when it is taken down. Its root dataset is mounted at the backing's ``data``. With zfs-fuse the
backing has a daemon of its own (`layerfs.backings.zfs_fuse`) that lives from up to down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

from layerfs import mount_table, mounts
from layerfs.backings import places, zfs_fuse, zfs_tools
from layerfs.backings.kind import BackingSpec, Kind, Space, free_bytes, refuse_pool_settings
from layerfs.backings.zfs_tools import Tools, ZfsRefused
from layerfs.errors import Damaged, EnvironmentUnfit, FailedPrecondition, LayerfsError
from layerfs.filesystems import signature
from layerfs.kernel import mountapi as api
from layerfs.programs import run

_SMALLEST = 128 * places.MIB
_LINK = "zpool"
LOCK = "zfs.lock"
"""What commands for this pool have locked while they run, see `zfs_tools.Tools`."""
_BUSY_SECONDS = 3.0


class Zpool(Kind):
    """``zfs``."""

    files = ("backing.img", "backing.img.new", _LINK, LOCK, *zfs_fuse.FILES)

    def __init__(self, root: Path, spec: BackingSpec, uuid: str) -> None:
        super().__init__(root, spec, uuid)
        self._daemon = zfs_fuse.Daemon(root) if zfs_tools.in_user_space() else None
        self._tools = Tools(self._daemon, root / LOCK)
        self._pool = f"layerfs-{uuid}"

    @classmethod
    def validate(cls, spec: BackingSpec) -> None:
        places.check_size(spec.size, spec.device, "zfs", _SMALLEST)
        refuse_pool_settings(spec)

    def prepare(self, *, force: bool) -> BackingSpec:
        if os.geteuid() != 0:
            raise EnvironmentUnfit("making a zfs backing makes a pool and mounts it; run it as root")
        zfs_tools.check_usable()
        if self.spec.device is None:
            return dataclasses.replace(
                self.spec, size=self.spec.size or places.default_size(self.root, "zfs", _SMALLEST)
            )
        places.check_unused(self.spec.device)
        if not force and not self._is_ours(self.spec.device):
            places.check_empty(self.spec.device)
        return self.spec

    def make(self) -> None:
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._take_apart()
        with contextlib.ExitStack() as stack:
            self._start()
            if self.spec.device is not None:
                run(["wipefs", "--all", self.spec.device], "util-linux")  # the pool leaves others' signatures there
                self._create(self.spec.device)
            else:
                assert self._image is not None
                assert self.spec.size is not None
                self._create(str(stack.enter_context(places.new_image(self._image, self.spec.size))))
            self._take_apart()
        self._link()

    def is_up(self) -> bool:
        point = self._mount_point()
        if point is None or point.type not in zfs_tools.TYPES or point.source != self._pool:
            return False
        return self._daemon is None or self._daemon.pid() is not None

    def up(self) -> None:
        self._tools.settled()
        self._link()
        self._start()
        try:
            if not self._is_imported():
                self._tools.zpool("import", "-f", "-d", str(self.root / _LINK), "-R", str(self.path), self._pool)
            if not self.is_up():
                with contextlib.suppress(ZfsRefused):  # mounted already, but not where we can see it
                    self._tools.zfs("mount", "-O", self._pool)
            if not self.is_up():
                raise FailedPrecondition(self._elsewhere())
            os.chmod(self.path, 0o700)
        except ZfsRefused as error:
            self._take_apart()
            if error.missing:
                place = str(self._image or self.spec.device)
                text = f"{place!r} does not hold the pool that was made for {str(self.root)!r}"
                raise Damaged(text) from error
            raise LayerfsError(f"bringing up the pool in {str(self.root)!r}: {error.words}") from error

    def down(self) -> None:
        self._tools.settled()
        if not self._is_gone():
            self._check_unused()
        self._take_apart()

    def enlarge(self, size: int) -> BackingSpec:
        if self._image is None:
            return self.spec
        places.enlarge_image(self._image, size)
        return dataclasses.replace(self.spec, size=size)

    def grow(self) -> None:
        """See `Kind.grow`. zfs-fuse sees a new size only when it imports the pool."""
        was_up = self.is_up()
        if was_up and self._daemon is not None:
            self.down()
        if not self.is_up():
            self.up()
        try:
            self._tools.zpool("online", "-e", self._pool, str(self.root / _LINK / "disk"))
        finally:
            if not was_up:
                self.down()

    def erase(self) -> None:
        if self.spec.device and self._is_ours(self.spec.device):
            run(["wipefs", "--all", self.spec.device], "util-linux")

    def space(self) -> Space:
        """See `Kind.space`; for a sparse file no more is free than the file system below has."""
        found = self._tools.properties([self._pool], ("used", "available"))[self._pool]
        used, free = int(found["used"]), int(found["available"])
        return Space(free if self._image is None else min(free, free_bytes(self.root)), used + free)

    def facts(self) -> dict[str, str]:
        """``pool``, and where zfs-fuse is the implementation ``zfs-fuse``: the directory that its daemon belongs to."""
        return {"pool": self._pool} | ({"zfs-fuse": str(self.root)} if self._daemon else {})

    # Steps

    @property
    def _image(self) -> Path | None:
        return None if self.spec.device else self.root / "backing.img"

    def _is_ours(self, device: str) -> bool:
        return signature(device).get("LABEL") == self._pool

    def _link(self) -> None:
        """Have a directory with nothing but the pool's place in it, for the import to search."""
        folder = self.root / _LINK
        folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (folder / "disk").symlink_to(self.spec.device or "../backing.img")

    def _create(self, place: str) -> None:
        options = ["-o", "autoexpand=on", "-O", "mountpoint=/", "-O", "atime=off"]
        if self._daemon is None:
            options += ["-o", "ashift=12", "-o", "autotrim=on"]
        try:
            self._tools.zpool("create", "-f", "-R", str(self.path), *options, self._pool, place)
        except ZfsRefused as error:
            raise LayerfsError(f"making a pool on {place!r}: {error.words}") from error

    def _start(self) -> None:
        """Have the kernel's module loaded, or else the daemon run and what it mounts seen here."""
        if self._daemon is None:
            zfs_tools.load_module()
            return
        if self._daemon.is_there():
            return
        self._clear_dead()
        if self._mount_point() is None:
            api.mount(str(self.path), str(self.path), "", api.MS_BIND)
        api.mount("", str(self.path), "", api.MS_PRIVATE)  # no longer a peer of what it was bound from
        api.mount("", str(self.path), "", api.MS_SHARED)
        try:
            with self._tools.held() as fd:
                self._daemon.start(fd)
        except BaseException:
            self._clear_dead()
            mounts.unmount(self.path)
            raise

    def _take_apart(self) -> None:
        """Unmount, export, end the daemon; what is gone already is passed over."""
        try:
            if self._daemon is not None and self._daemon.is_stuck(self.path):
                self._daemon.stop()  # the pool stays as it was at its last transaction
            if not self._is_gone():
                self._unmount_all()
                self._export()
                if self._daemon is not None:
                    self._daemon.stop()
        except LayerfsError:
            if not self._is_gone():  # or else it died meanwhile
                raise
        if self._is_gone():
            self._clear_dead()
        if self._mount_point() is not None:
            mounts.unmount(self.path)

    def _unmount_all(self) -> None:
        for point in reversed(self._points()):
            if self._daemon is not None:
                zfs_fuse.unmount(point)
            else:
                mounts.unmount(point.target)

    def _export(self) -> None:
        deadline = time.monotonic() + _BUSY_SECONDS
        while self._is_imported():
            try:
                self._tools.zpool("export", self._pool)
            except ZfsRefused as error:
                if error.missing:
                    return
                if not error.busy:
                    raise
                if time.monotonic() > deadline:
                    with contextlib.suppress(LayerfsError):
                        self._tools.zfs("mount", "-O", self._pool)
                    text = f"the backing at {str(self.path)!r} is in use: a layer on it is still open"
                    raise FailedPrecondition(text) from error
                time.sleep(0.05)

    def _is_imported(self) -> bool:
        try:
            self._tools.zpool("list", "-H", "-o", "name", self._pool)
        except ZfsRefused as error:
            if error.missing:
                return False
            raise
        return True

    def _is_gone(self) -> bool:
        """Whether nothing of the pool can be up, so that mounts of it are but leftovers."""
        return not zfs_tools.module_loaded() if self._daemon is None else self._daemon.pid() is None

    def _check_unused(self) -> None:
        """Raise `FailedPrecondition` naming mounts of the pool's datasets that are not ours."""
        own = {point.id for point in self._points()}
        users = [repr(str(point.target)) for point in self._datasets() if point.id not in own]
        if users:
            raise FailedPrecondition(f"the backing at {str(self.path)!r} is in use by the mounts {', '.join(users)}")

    def _clear_dead(self) -> None:
        """Take mounts away whose daemon is dead; the last one first."""
        for point in reversed(self._points()):
            mounts.unmount(point.target, lazy=True)

    def _datasets(self) -> Iterator[mount_table.MountPoint]:
        """Every mount of a dataset of the pool, wherever."""
        for point in mount_table.read():
            if point.type in zfs_tools.TYPES and point.source.replace("@", "/").split("/")[0] == self._pool:
                yield point

    def _points(self) -> list[mount_table.MountPoint]:
        """The mounts of datasets at and below `path`, in the order in which they came."""
        top = Path(os.path.realpath(self.root)) / "data"
        return [point for point in self._datasets() if point.target.is_relative_to(top)]

    def _mount_point(self) -> mount_table.MountPoint | None:
        return next(reversed(mount_table.at(Path(os.path.realpath(self.root)) / "data")), None)

    def _elsewhere(self) -> str:
        reason = f"the pool in {str(self.root)!r} is up, but in another mount namespace; use it from there"
        pid = self._daemon.pid() if self._daemon else None
        return reason if pid is None else f"{reason}, or end its zfs-fuse (process {pid}) and try again"
