"""Copying and removing whole file trees, relative to directory descriptors and without following any link.

A copy keeps everything that the kernel lets a process set: holes, hard links, extended attributes with ACLs and
capabilities, devices, fifos, sockets, owners, modes and times in nanoseconds. File contents are shared (reflink) where
the file system can, else copied inside the kernel, else read and written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from layerfs import xattrs
from layerfs.errors import FailedPrecondition
from layerfs.kernel import xattr
from layerfs.kernel.clone import reflink
from layerfs.kernel.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# Paths are opened in parts that stay below PATH_MAX: a tree can be deeper than a path can name.
_PART = 3500
_CHUNK = 1 << 20
_SMALL = 1 << 16

_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_UNDELETABLE_FLAGS = 0x10 | 0x20  # FS_IMMUTABLE_FL, FS_APPEND_FL

# What a file system or a security module may refuse for its own label, which it then sets by its own rules.
_LABEL_REFUSALS = frozenset({errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL})


def copy_file(
    src_dir_fd: int,
    src_name: str | bytes,
    dst_dir_fd: int,
    dst_name: str | bytes,
    *,
    info: os.stat_result | None = None,
    contents: bool = True,
) -> None:
    """Copy one file of any type but a directory, with all its metadata; ``dst_name`` must not exist.

    ``info`` is the source's `os.lstat`, where the caller has it already. Without ``contents`` a regular file comes
    empty. Raises `OSError`.
    """
    if info is None:
        info = os.stat(src_name, dir_fd=src_dir_fd, follow_symlinks=False)
    copier = _Copier(contents=contents)
    copier.file(src_dir_fd, os.fsdecode(src_name), dst_dir_fd, os.fsdecode(dst_name), info)


def copy_tree(src_fd: int, dst_fd: int) -> None:
    """Make the empty directory ``dst_fd`` an exact copy of the directory ``src_fd``, itself included.

    Raises `OSError`; what was copied until then stays. Mounts inside the source are copied like directories.
    """
    _Copier().tree(src_fd, dst_fd)


def copy_attributes(src_fd: int, dst_fd: int) -> None:
    """Give a directory the owner, mode, times and those attributes of another that belong to a layer."""
    info = os.fstat(src_fd)
    os.fchown(dst_fd, info.st_uid, info.st_gid)
    os.fchmod(dst_fd, stat.S_IMODE(info.st_mode))
    for key, value in xattrs.read(src_fd).items():
        os.setxattr(dst_fd, key, value)
    os.utime(dst_fd, ns=(info.st_atime_ns, info.st_mtime_ns))


def remove_tree(dir_fd: int, name: str | bytes) -> None:
    """Remove ``name`` in the directory ``dir_fd`` with all that is below it; one that is not there is no error.

    Modes, and immutable and append-only flags, do not stop it. Raises `FailedPrecondition` where something is mounted
    inside (nothing of the mount is touched), `OSError` otherwise.
    """
    text = os.fsdecode(name)
    try:
        if not _unlinked(dir_fd, text):
            _remove_directory(dir_fd, text)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EBUSY):
            reason = f"removing {text!r}: something is mounted inside; unmount it first"
            raise FailedPrecondition(reason) from error
        raise


# Copying


class _Leave(NamedTuple):
    """A directory whose entries are all copied once the work list is back at this item."""

    path: str
    info: os.stat_result
    xattrs: dict[str, bytes]


class _Copier:
    """One copy: what the file systems turned out to be able to do, and the hard links met so far."""

    def __init__(self, *, contents: bool = True) -> None:
        self.can_reflink = True
        self.can_copy_range = True
        self.contents = contents
        self.links: dict[tuple[int, int], tuple[str, str]] = {}
        self.owner = os.geteuid(), os.getegid()

    def tree(self, src: int, dst: int) -> None:
        _make_plain(dst, self.owner)
        todo: list[str | _Leave] = [""]
        while todo:
            item = todo.pop()
            if isinstance(item, str):
                todo += self._enter(src, dst, item)
            else:
                with _opened(dst, item.path) as fd:
                    self._finish(fd, item.info, item.xattrs)

    def _enter(self, src: int, dst: int, path: str) -> list[str | _Leave]:
        """Copy the entries of one directory; what is left to do afterwards, the last item first."""
        with _opened(src, path) as src_dir, _opened(dst, path) as dst_dir:
            todo: list[str | _Leave] = [_Leave(path, os.fstat(src_dir), _xattrs(src_dir))]
            prefix = path and path + "/"
            with os.scandir(src_dir) as entries:
                for entry in entries:
                    name = entry.name
                    if entry.is_dir(follow_symlinks=False):
                        os.mkdir(name, 0o700, dir_fd=dst_dir)
                        todo.append(prefix + name)
                        continue
                    info = entry.stat(follow_symlinks=False)
                    if info.st_nlink > 1 and self._linked(dst, path, dst_dir, name, info):
                        continue
                    self.file(src_dir, name, dst_dir, name, info)
        return todo

    def _linked(self, dst: int, path: str, dst_dir: int, name: str, info: os.stat_result) -> bool:
        """Link ``name`` to the copy of another name of the same inode; False when this is the first name."""
        inode = (info.st_dev, info.st_ino)
        if inode not in self.links:
            self.links[inode] = (path, name)
            return False
        first_path, first_name = self.links[inode]
        with _opened(dst, first_path) as first_dir:
            os.link(first_name, name, src_dir_fd=first_dir, dst_dir_fd=dst_dir, follow_symlinks=False)
        return True

    def file(self, src_dir: int, name: str, dst_dir: int, new: str, info: os.stat_result) -> None:
        if stat.S_ISREG(info.st_mode):
            self._regular(src_dir, name, dst_dir, new, info)
        elif stat.S_ISLNK(info.st_mode):
            os.symlink(os.readlink(name, dir_fd=src_dir), new, dir_fd=dst_dir)
            self._finish_by_name(src_dir, name, dst_dir, new, info)
        else:
            os.mknod(new, info.st_mode, info.st_rdev, dir_fd=dst_dir)
            self._finish_by_name(src_dir, name, dst_dir, new, info)

    def _regular(self, src_dir: int, name: str, dst_dir: int, new: str, info: os.stat_result) -> None:
        src = os.open(name, _READ, dir_fd=src_dir)
        try:
            dst = os.open(new, _CREATE, 0o600, dir_fd=dst_dir)
            try:
                if info.st_size and self.contents:
                    self._contents(src, dst, info)
                self._finish(dst, info, _xattrs(src))
            finally:
                os.close(dst)
        finally:
            os.close(src)

    def _contents(self, src: int, dst: int, info: os.stat_result) -> None:
        size = info.st_size
        if self.can_reflink:
            if reflink(src, dst):
                return
            self.can_reflink = False
        if info.st_blocks * 512 >= size:
            self._range(src, dst, 0, size)
            return
        for start, end in _data(src, size):
            self._range(src, dst, start, end)
        os.ftruncate(dst, size)

    def _range(self, src: int, dst: int, start: int, end: int) -> None:
        """Copy the bytes from ``start`` to ``end``, or to where the source ends earlier."""
        if end - start > _SMALL:  # below that, read and write are faster than a splice
            while self.can_copy_range and start < end:
                try:
                    copied = os.copy_file_range(src, dst, end - start, start, start)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
                    self.can_copy_range = False
                    break
                if not copied:
                    break
                start += copied
        while start < end:
            block = os.pread(src, min(end - start, _CHUNK), start)
            if not block:
                break
            written = os.pwrite(dst, block, start)
            start += written

    def _finish(self, fd: int, info: os.stat_result, xattrs: dict[str, bytes]) -> None:
        """Owner, mode, attributes and times, in the order in which none undoes another."""
        if (info.st_uid, info.st_gid) != self.owner:
            os.fchown(fd, info.st_uid, info.st_gid)
        os.fchmod(fd, stat.S_IMODE(info.st_mode))
        for key, value in xattrs.items():
            _set_xattr(fd, key, value)
        os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))

    def _finish_by_name(self, src_dir: int, name: str, dst_dir: int, new: str, info: os.stat_result) -> None:
        """`_finish` for what cannot be opened: links, devices, fifos, sockets."""
        if (info.st_uid, info.st_gid) != self.owner:
            os.chown(new, info.st_uid, info.st_gid, dir_fd=dst_dir, follow_symlinks=False)
        if not stat.S_ISLNK(info.st_mode):
            os.chmod(new, stat.S_IMODE(info.st_mode), dir_fd=dst_dir)
        source, target = f"/proc/self/fd/{src_dir}/{name}", f"/proc/self/fd/{dst_dir}/{new}"
        for key, value in _xattrs(source).items():
            _set_xattr(target, key, value)
        os.utime(new, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=dst_dir, follow_symlinks=False)


def _make_plain(fd: int, owner: tuple[int, int]) -> None:
    """Take from an empty directory what its copy or its entries would inherit: owner, setgid bit, default ACLs."""
    info = os.fstat(fd)
    if (info.st_uid, info.st_gid) != owner:
        os.fchown(fd, *owner)
    os.fchmod(fd, 0o700)
    for key in _listed(fd):
        if key.startswith("system.posix_acl_"):
            os.removexattr(fd, key)


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are no holes, as (start, end)."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _listed(file: int | str) -> list[str]:
    try:
        return os.listxattr(file) if isinstance(file, int) else os.listxattr(file, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise


def _xattrs(file: int | str) -> dict[str, bytes]:
    """All extended attributes of a descriptor, or of a name whose last part is not followed."""
    keys = _listed(file)
    return {key: xattr.get(file, key, follow_symlinks=False) for key in keys}


def _set_xattr(file: int | str, key: str, value: bytes) -> None:
    try:
        if isinstance(file, int):
            os.setxattr(file, key, value)
        else:
            os.setxattr(file, key, value, follow_symlinks=False)
    except OSError as error:
        is_label = key.startswith("security.") and key != "security.capability"
        if not (is_label and error.errno in _LABEL_REFUSALS):
            raise


@contextmanager
def _opened(root: int, path: str, resolve: int = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS) -> Iterator[int]:
    """The directory ``path`` below ``root``, open for reading; ``""`` is the root itself."""
    fd = openat2(root, ".", _DIRECTORY) if len(path) > _PART or not path else root
    try:
        while len(path) > _PART:
            cut = path.rindex("/", 0, _PART)
            fd, old = openat2(fd, path[:cut], _DIRECTORY, resolve=resolve), fd
            os.close(old)
            path = path[cut + 1 :]
        if path:
            last = openat2(fd, path, _DIRECTORY, resolve=resolve)
            if fd != root:
                os.close(fd)
            fd = last
        yield fd
    finally:
        if fd != root:
            os.close(fd)


# Removing


def _remove_directory(dir_fd: int, name: str) -> None:
    """Empty and remove a directory, without holding a descriptor for each level and without recursion."""
    todo = [(name, False)]
    refilled: set[str] = set()
    while todo:
        path, emptied = todo.pop()
        parent, _, last = path.rpartition("/")
        if emptied:
            with _opened_for_removal(dir_fd, parent) as above:
                if not _rmdir(above, last, final=path in refilled):
                    refilled.add(path)
                    todo.append((path, False))
            continue
        with _opened_for_removal(dir_fd, path) as fd:
            todo.append((path, True))
            with os.scandir(fd) as entries:
                listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for child, is_directory in listed:
                if is_directory or not _unlinked(fd, child):
                    todo.append((f"{path}/{child}", False))


@contextmanager
def _opened_for_removal(dir_fd: int, path: str) -> Iterator[int]:
    """`_opened`, which stays in the mount and helps itself to the permission to read and search."""
    flags = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(_opened(dir_fd, path, flags))
        except PermissionError:
            parent, _, last = path.rpartition("/")
            with _opened(dir_fd, parent, flags) as above:
                _make_deletable(above)
                _make_searchable(above, last)
            fd = stack.enter_context(_opened(dir_fd, path, flags))
        yield fd


def _make_searchable(dir_fd: int, name: str) -> None:
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)  # fchmod(2) does not take an O_PATH descriptor
    finally:
        os.close(fd)


def _unlinked(dir_fd: int, name: str) -> bool:
    """Unlink a file; False when it is a directory."""
    try:
        _insist(os.unlink, dir_fd, name)
    except IsADirectoryError:
        return False
    except FileNotFoundError:
        pass
    return True


def _rmdir(dir_fd: int, name: str, *, final: bool) -> bool:
    """Remove a directory; False when there is still (or again) something in it and this is not the final try."""
    try:
        _insist(os.rmdir, dir_fd, name)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.ENOTEMPTY or final:
            raise
        return False
    return True


def _insist(remove: Callable[..., None], dir_fd: int, name: str) -> None:
    """Remove a name; where flags or modes forbid it, clear those of the directory and of the file, and try again."""
    try:
        remove(name, dir_fd=dir_fd)
    except PermissionError:
        _make_deletable(dir_fd)
        with contextlib.suppress(OSError):  # a link, a fifo or a device: these have no flags
            fd = os.open(name, _READ | os.O_NONBLOCK, dir_fd=dir_fd)
            try:
                _clear_flags(fd)
            finally:
                os.close(fd)
        remove(name, dir_fd=dir_fd)


def _make_deletable(dir_fd: int) -> None:
    _clear_flags(dir_fd)
    mode = stat.S_IMODE(os.fstat(dir_fd).st_mode)
    if mode & 0o700 != 0o700:
        with contextlib.suppress(PermissionError):
            os.fchmod(dir_fd, mode | 0o700)


def _clear_flags(fd: int) -> None:
    """Clear the immutable and append-only flags, where there are such (chattr(1))."""
    with contextlib.suppress(OSError):
        (flags,) = struct.unpack("=i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, b"\0" * 4))
        if flags & _UNDELETABLE_FLAGS:
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("=i", flags & ~_UNDELETABLE_FLAGS))
