"""What a backing is made on: a sparse file, which a loop device makes a block device of, or a device that was given."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerfs.backings.kind import free_bytes
from layerfs.errors import (
    Damaged,
    EnvironmentUnfit,
    FailedPrecondition,
    InvalidArgument,
    OutOfSpace,
    refused,
)
from layerfs.filesystems import signature
from layerfs.kernel import loop
from layerfs.sizes import format_size

MIB = 1 << 20
_LARGEST_DEFAULT = 1 << 40


# Sparse files


@contextmanager
def new_image(path: Path, size: int) -> Iterator[Path]:
    """Make the sparse file ``path`` as ``PATH.new``, where the body fills it; it gets its name at the end."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)  # a killed process's mkfs may still write to the old one
    with open(new, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(size)
    yield new
    with opened(new, os.O_RDWR) as fd:
        os.fsync(fd)
    new.rename(path)
    with directory(path.parent) as fd:
        os.fsync(fd)


def enlarge_image(image: Path, size: int) -> None:
    """Make the sparse file ``size`` bytes large. Raises `InvalidArgument` for less than it is."""
    now = image.stat().st_size
    if size < now:
        reason = f"{format_size(size)} is less than the backing's {format_size(now)}, and it cannot shrink"
        raise InvalidArgument(reason)
    os.truncate(image, size)


def default_size(root: Path, kind: str, smallest: int) -> int:
    """The size of a sparse file where none is asked for. Raises `OutOfSpace` where it would be too small."""
    smallest = max(smallest, 256 * MIB)
    size = min(free_bytes(root) * 8 // 10, _LARGEST_DEFAULT) // MIB * MIB
    if size < smallest:
        raise OutOfSpace(
            f"making a {kind} backing in {str(root)!r}: it needs {format_size(smallest)}, "
            f"and only {format_size(free_bytes(root))} are free; free some space or choose another root"
        )
    return size


def check_size(size: int | None, device: str | None, kind: str, smallest: int) -> None:
    """Raise `InvalidArgument` for a size that is too small, or given along with a device."""
    if device is not None and size is not None:
        raise InvalidArgument("a backing on a device has the device's size; leave the size out")
    if size is not None and size < smallest:
        raise InvalidArgument(f"{format_size(size)} is too small for {kind}; give it {format_size(smallest)} or more")


# Block devices


def check_unused(device: str) -> None:
    """Raise `InvalidArgument` for what is no block device, `FailedPrecondition` for one in use."""
    try:
        if not stat.S_ISBLK(os.stat(device).st_mode):
            raise InvalidArgument(f"{device!r} is not a block device")
        with opened(device, os.O_RDWR | os.O_EXCL):
            return
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise FailedPrecondition(f"{device!r} is in use (mounted, or part of something); free it first") from error
        raise refused(f"opening the device {device!r}", error) from error


def check_empty(device: str) -> None:
    """Raise `FailedPrecondition` where blkid(8) knows something that is on the device."""
    if found := signature(device):
        what = found.get("TYPE") or found.get("PTTYPE") or "something"
        raise FailedPrecondition(f"{device!r} already holds data ({what}); use force to lose it for good")


def is_free(device: str) -> bool:
    """Whether the kernel has let go of a device, which mounts without a place in the file tree can keep from it."""
    for _ in range(50):
        try:
            with opened(device, os.O_RDONLY | os.O_EXCL):
                return True
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        time.sleep(0.01)
    return False


@contextmanager
def block_device(image: Path | None, device: str | None) -> Iterator[str]:
    """The name of the block device: the one given, or the loop device of the image, which the body has to mount."""
    if image is None:
        assert device is not None
        yield device
        return
    try:
        with contextlib.ExitStack() as stack:
            found = loop.find(image)  # never two devices on one image: each would cache it on its own
            if found:
                stack.enter_context(opened(found[0], os.O_RDWR))
                name = found[0]
            else:
                file = stack.enter_context(opened(image, os.O_RDWR))
                name, fd = loop.attach(file, str(image), direct_io=True)
                stack.callback(os.close, fd)
            yield str(name)
    except FileNotFoundError as error:
        if error.filename == str(image):
            raise Damaged(f"the backing's file {str(image)!r} is gone") from error
        raise EnvironmentUnfit(f"attaching a loop device: {error}; load the module (modprobe loop)") from error
    except OSError as error:
        raise refused(f"attaching a loop device to {str(image)!r}", error) from error


def update_capacity(image: Path) -> None:
    """Let the loop devices of a sparse file that has grown know its size."""
    for device in loop.find(image):
        with opened(device, os.O_RDWR) as fd:
            loop.set_capacity(fd)


def release(image: Path) -> None:
    """Wait until the kernel has freed the image's loop device, and ask it to where it has not."""
    for attempt in range(200):
        found = loop.find(image)
        if not found:
            return
        if attempt == 100:
            for device in found:
                loop.detach(device)
        time.sleep(0.01)


# Files


def write_whole(path: Path, text: str) -> None:
    """Give the file ``path`` other contents, safe against a crash at any point: it has the old or the new ones."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    with directory(path.parent) as fd:
        os.fsync(fd)


@contextmanager
def opened(path: Path | str, flags: int) -> Iterator[int]:
    """A descriptor of ``path``, made with mode 0600 where ``flags`` say so."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def directory(path: Path) -> Iterator[int]:
    """A descriptor of the directory ``path``."""
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        yield fd
