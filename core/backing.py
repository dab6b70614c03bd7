"""The file system that a driver's data lives on: made on a sparse file or a given device, mounted, grown, taken down.

A backing has a root directory, where it keeps::

    backing.json   what it is, written before anything is made
    backing.img    the sparse file, where no device was given
    backing.lock   held during each operation, so that several processes can call them at once
    data/          where it is mounted; with kind ``dir`` a plain directory

Nothing here needs a clean end: the kernel frees the loop device once it is unmounted, and `Backing.create`,
`Backing.up`, `Backing.down` and `Backing.destroy` finish what a killed process began.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from layerfs import filesystems, mounts
from layerfs.driver import Mount
from layerfs.errors import (
    AlreadyExists,
    Damaged,
    EnvironmentUnfit,
    FailedPrecondition,
    InvalidArgument,
    KernelRefused,
    LayerfsError,
    NotFound,
    OutOfSpace,
    refused,
)
from layerfs.kernel import btrfs, loop
from layerfs.sizes import format_size
from layerfs.treecopy import remove_tree

DIRECTORY = "dir"
"""The kind of backing that is nothing but a directory of the file system that is there."""

_MIB = 1 << 20
_LARGEST_DEFAULT = 1 << 40


@dataclass(frozen=True, slots=True)
class BackingSpec:
    """What a backing is to be; plain values only, so that `dataclasses.asdict` of it is JSON.

    Attributes:
        filesystem: ``dir``, ``btrfs``, ``ext4`` (with project quota where the kernel has it) or ``xfs``.
        size: bytes of the sparse file; None is 80 % of what is free, at most 1 TiB. Not for ``dir`` or a device.
        device: a block device to use instead of a sparse file.
    """

    filesystem: str = DIRECTORY
    size: int | None = None
    device: str | None = None


class Space(NamedTuple):
    """Bytes that can still be written, and bytes in all."""

    free: int
    total: int


FILESYSTEMS = (DIRECTORY, *filesystems.KINDS)
"""What `BackingSpec.filesystem` can be."""


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
        """The directory for data; it is there after `up`."""
        return self.root / "data"

    @classmethod
    def create(cls, root: Path, spec: BackingSpec, *, force: bool = False) -> Backing:
        """Make a backing in the directory ``root``, which is made too (mode 0700); one of the same kind may be there.

        A device that has anything on it is refused with `FailedPrecondition` unless ``force`` is set, one in use
        always. Raises `InvalidArgument` for a spec that cannot be, `AlreadyExists` where another kind is there,
        `EnvironmentUnfit` for a missing package or privilege, `OutOfSpace`.
        """
        _validate(spec)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(root):
            try:
                state = _read_state(root)
            except FileNotFoundError:
                state = _State(spec, str(uuid.uuid4()), made=False)
            if (state.spec.filesystem, state.spec.device) != (spec.filesystem, spec.device):
                raise AlreadyExists(
                    f"{str(root)!r} has a backing of kind {state.spec.filesystem!r} already; destroy that first"
                )
            if not state.made:
                if spec.filesystem != DIRECTORY:
                    state.spec = _make(root, state, spec, force=force)
                state.made = True
                _write_state(root, state)
        return cls(root)

    def up(self) -> None:
        """Make `path` usable: attach the loop device and mount. Up already is no error."""
        with _locked(self.root):
            self._up()

    def down(self) -> None:
        """Unmount, and free the loop device; the data stays. Down already is no error.

        Raises `FailedPrecondition` naming what uses it.
        """
        with _locked(self.root):
            self._down()

    def grow(self, size: int) -> None:
        """Make a sparse file ``size`` bytes large, or use all of a device that has grown (``size`` is then ignored).

        Raises `InvalidArgument` for less than there is now.
        """
        with _locked(self.root):
            self._state = self._load()
            if self.spec.filesystem == DIRECTORY:
                raise InvalidArgument("a backing of kind 'dir' has no size of its own; grow the file system it is on")
            if self.spec.device is None:
                self._grow_image(size)
            if self._is_up():
                self._grow_mounted()
            elif not self._grow_unmounted():
                self._up()
                self._grow_mounted()
                self._down()

    def destroy(self) -> None:
        """Take it down and delete it with all its data; a device loses its file system's signature.

        Raises `FailedPrecondition` naming what uses it. Destroyed already is no error.
        """
        if not self.root.exists():
            return
        with _locked(self.root):
            self._down()
            if self.spec.device and filesystems.signature(self.spec.device).get("UUID") == self._state.uuid:
                filesystems.run(["wipefs", "--all", self.spec.device], "util-linux")
            with _directory(self.root) as fd:
                for name in ("data", "backing.img", "backing.img.new", "backing.json", "backing.lock"):
                    remove_tree(fd, name)

    def space(self) -> Space:
        """What is free and what there is, for a sparse file no more than the file system below has. It must be up."""
        own = os.statvfs(self.path)
        free = own.f_bavail * own.f_frsize
        if self._image is not None:
            free = min(free, _free(self.root))
        return Space(free, own.f_blocks * own.f_frsize)

    # Steps, with the lock held

    @property
    def _image(self) -> Path | None:
        return None if self.spec.device or self.spec.filesystem == DIRECTORY else self.root / "backing.img"

    def _load(self) -> _State:
        try:
            return _read_state(self.root)
        except FileNotFoundError as error:
            raise NotFound(f"{str(self.root)!r} has no backing; make one first") from error

    def _mount_point(self) -> mounts.MountPoint | None:
        target = Path(os.path.realpath(self.path))
        return next((m for m in reversed(mounts.table()) if m.target == target), None)

    def _is_up(self) -> bool:
        if self.spec.filesystem == DIRECTORY:
            return self.path.is_dir()
        return self._mount_point() is not None

    def _up(self) -> None:
        if not self._state.made:
            raise FailedPrecondition(f"the backing in {str(self.root)!r} is half made; create it again")
        self.path.mkdir(mode=0o700, exist_ok=True)
        if self._is_up():
            return
        with _block_device(self._image, self.spec.device) as device:
            if filesystems.signature(device).get("UUID") != self._state.uuid:
                raise Damaged(f"{device!r} does not hold the file system that was made for {str(self.root)!r}")
            filesystems.mount(self.spec.filesystem, device, self.path)
        os.chmod(self.path, 0o700)

    def _down(self) -> None:
        if self.spec.filesystem == DIRECTORY:
            return
        point = self._mount_point()
        if point is not None:
            if users := list(_users(point)):
                raise FailedPrecondition(
                    f"the backing at {str(self.path)!r} is in use by the mounts {', '.join(users)}"
                )
            with _opened(point.source, os.O_RDONLY):  # keeps the loop device, should the mount have to come back
                mounts.unmount(self.path)
                if not _is_free(point.source):
                    filesystems.mount(self.spec.filesystem, point.source, self.path)
                    raise FailedPrecondition(
                        f"the backing at {str(self.path)!r} is in use: a layer on it is still open"
                    )
        if self._image is not None and self._image.exists():
            _release(self._image)

    def _grow_image(self, size: int) -> None:
        assert self._image is not None
        now = self._image.stat().st_size
        if size < now:
            reason = f"{format_size(size)} is less than the backing's {format_size(now)}, and it cannot shrink"
            raise InvalidArgument(reason)
        os.truncate(self._image, size)
        self._state.spec = dataclasses.replace(self.spec, size=size)
        _write_state(self.root, self._state)
        for device in loop.find(self._image):
            with _opened(device, os.O_RDWR) as fd:
                loop.set_capacity(fd)

    def _grow_mounted(self) -> None:
        point = self._mount_point()
        assert point is not None
        kind = filesystems.KINDS[self.spec.filesystem]
        if self.spec.filesystem == "btrfs":
            try:
                with _directory(self.path) as fd:
                    btrfs.resize(fd)
            except OSError as error:
                raise refused(f"growing the backing at {str(self.path)!r}", error) from error
            return
        try:
            filesystems.run([part.format(device=point.source, path=self.path) for part in kind.grow], kind.package)
        except LayerfsError:
            if not kind.grow_down:
                raise
            self._down()
            self._grow_unmounted()
            self._up()

    def _grow_unmounted(self) -> bool:
        """Grow it while it is down; False where its file system can grow only while it is mounted."""
        kind = filesystems.KINDS[self.spec.filesystem]
        with _block_device(self._image, self.spec.device) as device:
            for command in kind.grow_down:
                filesystems.run([part.format(device=device) for part in command], kind.package)
        return bool(kind.grow_down)


# Making


def _validate(spec: BackingSpec) -> None:
    if spec.filesystem not in FILESYSTEMS:
        raise InvalidArgument(f"no backing of kind {spec.filesystem!r}; there are {', '.join(FILESYSTEMS)}")
    if spec.filesystem == DIRECTORY:
        if spec.size is not None or spec.device is not None:
            raise InvalidArgument("a backing of kind 'dir' takes neither a size nor a device")
        return
    if spec.device is not None and spec.size is not None:
        raise InvalidArgument("a backing on a device has the device's size; leave the size out")
    smallest = filesystems.KINDS[spec.filesystem].smallest
    if spec.size is not None and spec.size < smallest:
        raise InvalidArgument(
            f"{format_size(spec.size)} is too small for {spec.filesystem}; give it {format_size(smallest)} or more"
        )


def _make(root: Path, state: _State, spec: BackingSpec, *, force: bool) -> BackingSpec:
    """Make the file system; the spec as it is now, with its size."""
    if os.geteuid() != 0:
        raise EnvironmentUnfit(f"making a {spec.filesystem} backing mounts a block device; run it as root")
    kind = filesystems.KINDS[spec.filesystem]
    filesystems.tool(kind.mkfs[0], kind.package)
    if spec.device is not None:
        _make_on_device(root, state, spec.device, force=force)
        return spec
    return _make_on_image(root, state, dataclasses.replace(spec, size=spec.size or _default_size(root, spec)))


def _make_on_device(root: Path, state: _State, device: str, *, force: bool) -> None:
    _check_unused(device)
    found = filesystems.signature(device)
    # What carries our own UUID is the work of a process that was killed before it could say so.
    if found and not force and found.get("UUID") != state.uuid:
        what = found.get("TYPE") or found.get("PTTYPE") or "something"
        raise FailedPrecondition(f"{device!r} already holds data ({what}); use force to lose it for good")
    _write_state(root, state)
    _mkfs(state, device)


def _make_on_image(root: Path, state: _State, spec: BackingSpec) -> BackingSpec:
    new = root / "backing.img.new"
    assert spec.size is not None
    _write_state(root, state)
    new.unlink(missing_ok=True)  # a killed process's mkfs may still write to the old one
    try:
        with open(new, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(spec.size)
        _mkfs(state, str(new))
        with _opened(new, os.O_RDWR) as fd:
            os.fsync(fd)
        new.rename(root / "backing.img")
        with _directory(root) as fd:
            os.fsync(fd)
    except BaseException:
        new.unlink(missing_ok=True)
        (root / "backing.json").unlink(missing_ok=True)
        raise
    return spec


def _mkfs(state: _State, place: str) -> None:
    """Format a device or image, with the richest set of features that this kernel can mount."""
    kind = filesystems.KINDS[state.spec.filesystem]
    command = [part.format(uuid=state.uuid) for part in kind.mkfs]
    for features in kind.features:
        filesystems.run([*command, *features, place], kind.package)
        if features == kind.features[-1] or _mountable(state.spec.filesystem, place):
            return


def _mountable(filesystem: str, place: str) -> bool:
    image = None if stat.S_ISBLK(os.stat(place).st_mode) else Path(place)
    try:
        with (
            _block_device(image, place) as device,
            mounts.opened([Mount(filesystem, device, filesystems.KINDS[filesystem].options[0])]),
        ):
            pass
    except KernelRefused as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        if image:
            _release(image)
    return True


def _default_size(root: Path, spec: BackingSpec) -> int:
    smallest = max(filesystems.KINDS[spec.filesystem].smallest, 256 * _MIB)
    size = min(_free(root) * 8 // 10, _LARGEST_DEFAULT) // _MIB * _MIB
    if size < smallest:
        raise OutOfSpace(
            f"making a {spec.filesystem} backing in {str(root)!r}: it needs {format_size(smallest)}, "
            f"and only {format_size(_free(root))} are free; free some space or choose another root"
        )
    return size


# Devices


def _check_unused(device: str) -> None:
    try:
        if not stat.S_ISBLK(os.stat(device).st_mode):
            raise InvalidArgument(f"{device!r} is not a block device")
        with _opened(device, os.O_RDWR | os.O_EXCL):
            return
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise FailedPrecondition(f"{device!r} is in use (mounted, or part of something); free it first") from error
        raise refused(f"opening the device {device!r}", error) from error


def _is_free(device: str) -> bool:
    """Whether the kernel has let go of a device, which mounts without a place in the file tree can keep from it."""
    for _ in range(50):
        try:
            with _opened(device, os.O_RDONLY | os.O_EXCL):
                return True
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        time.sleep(0.01)
    return False


@contextmanager
def _block_device(image: Path | None, device: str | None) -> Iterator[str]:
    """The name of the block device: the one given, or the loop device of the image, which the body has to mount."""
    if image is None:
        assert device is not None
        yield device
        return
    try:
        with contextlib.ExitStack() as stack:
            found = loop.find(image)  # never two devices on one image: each would cache it on its own
            if found:
                stack.enter_context(_opened(found[0], os.O_RDWR))
                name = found[0]
            else:
                file = stack.enter_context(_opened(image, os.O_RDWR))
                name, fd = loop.attach(file, str(image), direct_io=True)
                stack.callback(os.close, fd)
            yield str(name)
    except FileNotFoundError as error:
        if error.filename == str(image):
            raise Damaged(f"the backing's file {str(image)!r} is gone") from error
        raise EnvironmentUnfit(f"attaching a loop device: {error}; load the module (modprobe loop)") from error
    except OSError as error:
        raise refused(f"attaching a loop device to {str(image)!r}", error) from error


def _release(image: Path) -> None:
    """Wait until the kernel has freed the image's loop device, and ask it to where it has not."""
    for attempt in range(200):
        found = loop.find(image)
        if not found:
            return
        if attempt == 100:
            for device in found:
                loop.detach(device)
        time.sleep(0.01)


def _users(point: mounts.MountPoint) -> Iterator[str]:
    """The mounts that stand on the backing: binds and snapshots of it, and overlays over its directories."""
    below = f"{point.target}/"
    for mount in mounts.table():
        dirs = (part for option in mount.super_options for part in option.partition("=")[2].split(":"))
        same = mount.device == point.device and mount.id != point.id
        if same or (mount.type == "overlay" and any(part.startswith(below) for part in dirs)):
            yield repr(str(mount.target))


# Files


def _free(path: Path) -> int:
    host = os.statvfs(path)
    return host.f_bavail * host.f_frsize


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with _opened(root / "backing.lock", os.O_RDWR | os.O_CREAT) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(path: Path | str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        yield fd


def _read_state(root: Path) -> _State:
    raw = json.loads((root / "backing.json").read_text())
    return _State(BackingSpec(**raw["spec"]), raw["uuid"], raw["made"])


def _write_state(root: Path, state: _State) -> None:
    """Replace ``backing.json`` as a whole, safe against a crash at any point."""
    new = root / "backing.json.new"
    with open(new, "w") as file:
        json.dump(dataclasses.asdict(state), file)
        file.flush()
        os.fsync(file.fileno())
    new.rename(root / "backing.json")
    with _directory(root) as fd:
        os.fsync(fd)
