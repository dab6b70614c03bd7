"""A file system on a block device: a loop device over a sparse file, or a device that was given.

Nothing here needs a clean end: the kernel frees the loop device once it is unmounted.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from layerfs import filesystems, mount_table, mounts
from layerfs.backings import places
from layerfs.backings.kind import BackingSpec, Kind, Space, free_bytes, refuse_pool_settings
from layerfs.driver import Mount
from layerfs.errors import Damaged, EnvironmentUnfit, FailedPrecondition, KernelRefused, LayerfsError, refused
from layerfs.kernel import btrfs
from layerfs.programs import run, tool

_SETTLING = 2.0  # seconds


class FileSystem(Kind):
    """One of `layerfs.filesystems.KINDS`."""

    files = ("backing.img", "backing.img.new")

    @classmethod
    def validate(cls, spec: BackingSpec) -> None:
        smallest = filesystems.KINDS[spec.filesystem].smallest
        places.check_size(spec.size, spec.device, spec.filesystem, smallest)
        refuse_pool_settings(spec)

    def prepare(self, *, force: bool) -> BackingSpec:
        if os.geteuid() != 0:
            raise EnvironmentUnfit(f"making a {self.spec.filesystem} backing mounts a block device; run it as root")
        tool(self._how.mkfs[0], self._how.package)
        if self.spec.device is None:
            size = self.spec.size or places.default_size(self.root, self.spec.filesystem, self._how.smallest)
            return dataclasses.replace(self.spec, size=size)
        places.check_unused(self.spec.device)
        # What carries our own UUID is the work of a process that was killed before it could say so.
        if not force and not self._is_ours(self.spec.device):
            places.check_empty(self.spec.device)
        return self.spec

    def make(self) -> None:
        if self.spec.device is not None:
            self._mkfs(self.spec.device)
            return
        assert self._image is not None
        assert self.spec.size is not None
        with places.new_image(self._image, self.spec.size) as new:
            self._mkfs(str(new))

    def is_up(self) -> bool:
        return self._mount_point() is not None

    def up(self) -> None:
        with places.block_device(self._image, self.spec.device) as device:
            if not self._is_ours(device):
                raise Damaged(f"{device!r} does not hold the file system that was made for {str(self.root)!r}")
            filesystems.mount(self.spec.filesystem, device, self.path)
        os.chmod(self.path, 0o700)

    def down(self) -> None:
        point = self._mount_point()
        if point is not None:
            if users := list(_users(point)):
                raise FailedPrecondition(
                    f"the backing at {str(self.path)!r} is in use by the mounts {', '.join(users)}"
                )
            with places.opened(point.source, os.O_RDONLY):  # keeps the loop device, should the mount have to come back
                mounts.unmount(self.path)
                if not _becomes_free(point.source):
                    filesystems.mount(self.spec.filesystem, point.source, self.path)
                    raise FailedPrecondition(
                        f"the backing at {str(self.path)!r} is in use: a layer on it is still open"
                    )
        if self._image is not None and self._image.exists():
            places.release(self._image)

    def enlarge(self, size: int) -> BackingSpec:
        if self._image is None:
            return self.spec
        places.enlarge_image(self._image, size)
        return dataclasses.replace(self.spec, size=size)

    def grow(self) -> None:
        if self._image is not None:
            places.update_capacity(self._image)
        if self.is_up():
            self._grow_mounted()
        elif not self._grow_unmounted():
            self.up()
            self._grow_mounted()
            self.down()

    def erase(self) -> None:
        if self.spec.device and self._is_ours(self.spec.device):
            run(["wipefs", "--all", self.spec.device], "util-linux")

    def space(self) -> Space:
        """See `Kind.space`; for a sparse file no more is free than the file system below has."""
        free, total = super().space()
        return Space(free if self._image is None else min(free, free_bytes(self.root)), total)

    @property
    def _how(self) -> filesystems.Kind:
        return filesystems.KINDS[self.spec.filesystem]

    @property
    def _image(self) -> Path | None:
        return None if self.spec.device else self.root / "backing.img"

    def _is_ours(self, device: str) -> bool:
        return filesystems.signature(device).get("UUID") == self.uuid

    def _mount_point(self) -> mount_table.MountPoint | None:
        return next(reversed(mount_table.at(self.path)), None)

    def _mkfs(self, place: str) -> None:
        """Format a device or image, with the richest set of features that this kernel can mount."""
        command = [part.format(uuid=self.uuid) for part in self._how.mkfs]
        for features in self._how.features:
            run([*command, *features, place], self._how.package)
            if features == self._how.features[-1] or _mountable(self._how, place):
                return

    def _grow_mounted(self) -> None:
        point = self._mount_point()
        assert point is not None
        if self.spec.filesystem == "btrfs":
            try:
                with places.directory(self.path) as fd:
                    btrfs.resize(fd)
            except OSError as error:
                raise refused(f"growing the backing at {str(self.path)!r}", error) from error
            return
        try:
            run([part.format(device=point.source, path=self.path) for part in self._how.grow], self._how.package)
        except LayerfsError as error:
            if not self._how.grow_down:
                raise
            try:
                self.down()
            except FailedPrecondition as used:
                raise FailedPrecondition(f"{used}, and while it is, {error}; unmount those first") from error
            self._grow_unmounted()
            self.up()

    def _grow_unmounted(self) -> bool:
        """Grow it while it is down; False where its file system can grow only while it is mounted."""
        with places.block_device(self._image, self.spec.device) as device:
            for command in self._how.grow_down:
                run([part.format(device=device) for part in command], self._how.package)
        return bool(self._how.grow_down)


def _mountable(how: filesystems.Kind, place: str) -> bool:
    image = None if stat.S_ISBLK(os.stat(place).st_mode) else Path(place)
    try:
        with (
            places.block_device(image, place) as device,
            mounts.opened([Mount(how.type, device, how.options[0])]),
        ):
            pass
    except KernelRefused as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        if image:
            places.release(image)
    return True


def _users(point: mount_table.MountPoint) -> Iterator[str]:
    """The mounts that stand on the backing: binds and snapshots of it, and overlays over its directories."""
    below = f"{point.target}/"
    for mount in mount_table.read():
        dirs = (part for option in mount.super_options for part in option.partition("=")[2].split(":"))
        same = mount.device == point.device and mount.id != point.id
        if same or (mount.type == "overlay" and any(part.startswith(below) for part in dirs)):
            yield repr(str(mount.target))


def _becomes_free(device: str) -> bool:
    """Whether nothing holds a file system that was just unmounted, which what was open there may do for a moment."""
    until = time.monotonic() + _SETTLING
    while not places.is_free(device):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
