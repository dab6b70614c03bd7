"""The mount system calls: fsopen(2) and its family, and the older mount(2) and umount2(2).

The constants carry the kernel's own names (include/uapi/linux/mount.h, fcntl.h).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from layerfs.kernel.libc import check, encoded, fail, libc, syscall

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

OPEN_TREE_CLONE = 1

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_ATIME = 0x70
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOSYMFOLLOW = 0x100
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000
MS_RELATIME = 0x200000
MS_STRICTATIME = 0x1000000

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

VALUE_LIMIT = 255
"""The longest value in bytes that `fsconfig_string` can pass."""

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _FSPICK, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 433, 442
_CLOEXEC = 1
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_SET_FLAG, _SET_STRING, _CMD_CREATE, _CMD_RECONFIGURE = 0, 1, 6, 7
_FSPICK_CLOEXEC, _FSPICK_EMPTY_PATH = 0x1, 0x8
_MOVE_FROM_EMPTY, _MOVE_TO_EMPTY = 0x4, 0x40


def fsopen(filesystem: str) -> int:
    """A new file system context of that type. ENODEV: the kernel does not know it."""
    return check(syscall(_FSOPEN, encoded(filesystem), _CLOEXEC))


def fsconfig_string(context: int, key: str, value: str | bytes) -> None:
    """Set an option with a value, which may have up to `VALUE_LIMIT` bytes."""
    result = syscall(_FSCONFIG, context, _SET_STRING, encoded(key), encoded(value), 0)
    _configured(context, result, f"{key}={os.fsdecode(value)}")


def fsconfig_flag(context: int, key: str) -> None:
    """Set an option that has no value."""
    _configured(context, syscall(_FSCONFIG, context, _SET_FLAG, encoded(key), None, 0), key)


def fsconfig_create(context: int) -> None:
    """Make the superblock, or find the one that is there already."""
    _configured(context, syscall(_FSCONFIG, context, _CMD_CREATE, None, None, 0))


def fspick(fd: int) -> int:
    """A context for changing the options of the file system that ``fd`` is on."""
    return check(syscall(_FSPICK, fd, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH))


def fsconfig_reconfigure(context: int) -> None:
    """Let the context's options count for the file system that it was picked for."""
    _configured(context, syscall(_FSCONFIG, context, _CMD_RECONFIGURE, None, None, 0))


def fsmount(context: int, attributes: int = 0) -> int:
    """A detached mount of the context's superblock, as an O_PATH descriptor; it goes when that is closed."""
    return _configured(context, syscall(_FSMOUNT, context, _CLOEXEC, attributes))


def open_tree(dir_fd: int, path: str | bytes, flags: int = 0) -> int:
    """An O_PATH descriptor of a place in the tree, or, with `OPEN_TREE_CLONE`, of a detached bind mount of it."""
    return check(syscall(_OPEN_TREE, dir_fd, encoded(path), flags | os.O_CLOEXEC), path=path)


def move_mount(mount_fd: int, target_fd: int) -> None:
    """Attach a detached mount at the place that ``target_fd`` has open."""
    check(syscall(_MOVE_MOUNT, mount_fd, b"", target_fd, b"", _MOVE_FROM_EMPTY | _MOVE_TO_EMPTY))


def mount_setattr(mount_fd: int, set_: int, clear: int = 0, *, recursive: bool = False) -> None:
    """Change the attributes (``MOUNT_ATTR_*``) of the mount that ``mount_fd`` is the root of. Needs Linux 5.12."""
    attributes = struct.pack("=QQQQ", set_, clear, 0, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    check(syscall(_MOUNT_SETATTR, mount_fd, b"", flags, attributes, len(attributes)))


def mount(source: str | bytes, target: str | bytes, filesystem: str, flags: int = 0, data: bytes = b"") -> None:
    """mount(2). ``data`` must stay below one page, which the kernel would cut it at."""
    if len(data) >= os.sysconf("SC_PAGESIZE"):
        raise OSError(errno.E2BIG, "mount options longer than a page", os.fsdecode(target))
    result = libc.mount(
        encoded(source), encoded(target), encoded(filesystem), ctypes.c_ulong(flags), encoded(data) or None
    )
    check(result, path=target)


def umount(target: str | bytes | os.PathLike[str], flags: int = 0) -> None:
    """umount2(2). EINVAL: not a mount point; EBUSY: in use."""
    raw = encoded(target)
    check(libc.umount2(raw, flags), path=raw)


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2): make the mount at ``new`` the root of the mount namespace, and put the old root at ``old``."""
    check(libc.pivot_root(encoded(new), encoded(old)), path=new)


def unshare_mounts() -> None:
    """Give this process a mount namespace of its own, see CLONE_NEWNS in unshare(2)."""
    check(libc.unshare(_CLONE_NEWNS))


def unshare_cwd() -> None:
    """Give the calling thread a working directory (and umask) of its own; see CLONE_FS in unshare(2)."""
    check(libc.unshare(_CLONE_FS))


def _configured(context: int, result: int, about: str = "") -> int:
    """Hand ``result`` through, or raise with ``about`` and what the file system wrote into the context's log."""
    if result >= 0:
        return result
    number = ctypes.get_errno()
    messages = [about, *_log(context)] if about else _log(context)
    ctypes.set_errno(number)
    raise fail(detail="; ".join(messages))


def _log(context: int) -> list[str]:
    """The context's messages, oldest first, without the letter that tells their level."""
    messages: list[str] = []
    try:
        while len(messages) < 16:  # the kernel keeps 8
            messages.append(os.read(context, 4096).decode(errors="replace").strip().partition(" ")[2])
    except OSError:  # ENODATA: no more
        pass
    return messages
