"""Btrfs: subvolumes, snapshots, quota groups and tree searches, by ioctl (include/uapi/linux/btrfs.h)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from layerfs.kernel.ioctl import io, ior, iow, iowr
from layerfs.kernel.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2

ROOT_INODE = 256
"""The inode number of every subvolume's root directory."""

ROOT_TREE, QUOTA_TREE = 1, 8
ROOT_ITEM_KEY = 132
QGROUP_INFO_KEY = 242
INODE_ITEM_KEY, INODE_REF_KEY, XATTR_ITEM_KEY, DIR_ITEM_KEY, DIR_INDEX_KEY, EXTENT_DATA_KEY = 1, 12, 24, 84, 96, 108

_MAGIC = 0x94
_V1, _V2 = 4096, 4096  # sizes of struct btrfs_ioctl_vol_args and …_v2
_RESIZE = iow(_MAGIC, 3, _V1)
_SYNC = io(_MAGIC, 8)
_SUBVOL_CREATE = iow(_MAGIC, 14, _V1)
_TREE_SEARCH_V2 = iowr(_MAGIC, 17, 112)
_SNAP_CREATE_V2 = iow(_MAGIC, 23, _V2)
_GETFLAGS, _SETFLAGS = ior(_MAGIC, 25, 8), iow(_MAGIC, 26, 8)
_QUOTA_CTL = iowr(_MAGIC, 40, 16)
_QGROUP_CREATE = iow(_MAGIC, 42, 16)
_QGROUP_LIMIT = ior(_MAGIC, 43, 48)
_QUOTA_RESCAN_WAIT = io(_MAGIC, 46)
_GET_SUBVOL_INFO = ior(_MAGIC, 60, 504)
_GET_SUBVOL_ROOTREF = iowr(_MAGIC, 61, 4096)
_INO_LOOKUP_USER = iowr(_MAGIC, 62, 4096)
_SNAP_DESTROY_V2 = iow(_MAGIC, 63, _V2)

_RDONLY = 1 << 1  # BTRFS_SUBVOL_RDONLY; on disk, and in _GET_SUBVOL_INFO, it is another bit
_ROOT_RDONLY = 1 << 0
_QUOTA_ENABLE = 1
_MAX_RFER, _MAX_EXCL = 1, 2
_MAX64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Subvolume:
    """What the file system knows of one subvolume.

    Attributes:
        id: its tree's number; a quota group of level 0 has the same.
        generation: transaction of the last change; ``created`` the one in which it was made.
        uuid, parent_uuid: its own, and that of what it is a snapshot of (all zero where it is none).
    """

    id: int
    parent_id: int
    name: bytes
    generation: int
    created: int
    read_only: bool
    uuid: bytes
    parent_uuid: bytes


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a tree search: its key, the transaction that last wrote its tree block, and its bytes."""

    objectid: int
    type: int
    offset: int
    transid: int
    data: bytes


@dataclass(frozen=True, slots=True)
class QuotaGroup:
    """Bytes that a subvolume refers to, and those that nothing else refers to."""

    referenced: int
    exclusive: int


def create(parent_fd: int, name: str | bytes) -> None:
    """Make an empty subvolume. EEXIST: the name is taken; ENOTTY: this is no btrfs."""
    fcntl.ioctl(parent_fd, _SUBVOL_CREATE, bytearray(struct.pack("=q4088s", 0, _name(name, 4087))))


def snapshot(source_fd: int, parent_fd: int, name: str | bytes, *, read_only: bool = False) -> None:
    """Make a snapshot of the subvolume ``source_fd`` as ``name`` in ``parent_fd``."""
    flags = _RDONLY if read_only else 0
    fcntl.ioctl(
        parent_fd, _SNAP_CREATE_V2, bytearray(struct.pack("=qQQ32x4040s", source_fd, 0, flags, _name(name, 4039)))
    )


def destroy(parent_fd: int, name: str | bytes) -> None:
    """Delete a subvolume together with those nested in it; read-only ones too."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
    try:
        for path, child in nested(fd):
            set_read_only(fd, False)
            directory = openat2(fd, path, os.O_RDONLY | os.O_DIRECTORY, resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
            try:
                destroy(directory, child)
            finally:
                os.close(directory)
    finally:
        os.close(fd)
    fcntl.ioctl(parent_fd, _SNAP_DESTROY_V2, bytearray(struct.pack("=qQQ32x4040s", 0, 0, 0, _name(name, 4039))))


def nested(fd: int) -> list[tuple[bytes, bytes]]:
    """The subvolumes directly inside the subvolume ``fd``: (directory relative to it, name)."""
    found = []
    least = 0
    while True:
        buffer = bytearray(4096)
        struct.pack_into("=Q", buffer, 0, least)
        full = False
        try:
            fcntl.ioctl(fd, _GET_SUBVOL_ROOTREF, buffer)
        except OSError as error:
            if error.errno != errno.EOVERFLOW:
                raise
            full = True
        for index in range(buffer[4088]):
            tree, directory = struct.unpack_from("=QQ", buffer, 8 + 16 * index)
            found.append(_located(fd, tree, directory))
            least = tree + 1
        if not full:
            return found


def is_subvolume(fd: int) -> bool:
    """Whether the directory ``fd`` is the root of a btrfs subvolume."""
    if os.fstat(fd).st_ino != ROOT_INODE:
        return False
    try:
        is_read_only(fd)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    return True


def is_read_only(fd: int) -> bool:
    """Whether the subvolume ``fd`` has the read-only flag."""
    return bool(_flags(fd) & _RDONLY)


def set_read_only(fd: int, value: bool) -> None:
    """Set or clear the read-only flag of the subvolume ``fd``."""
    old = _flags(fd)
    new = old | _RDONLY if value else old & ~_RDONLY
    if new != old:
        fcntl.ioctl(fd, _SETFLAGS, struct.pack("=Q", new))


def info(fd: int) -> Subvolume:
    """Facts about the subvolume that the file ``fd`` lies in."""
    raw = bytearray(504)
    fcntl.ioctl(fd, _GET_SUBVOL_INFO, raw)
    number, name, parent, _, generation, flags, uuid, parent_uuid = struct.unpack_from("=Q256sQQQQ16s16s", raw)
    (created,) = struct.unpack_from("=Q", raw, 352)
    text = name.split(b"\0", 1)[0]
    return Subvolume(number, parent, text, generation, created, bool(flags & _ROOT_RDONLY), uuid, parent_uuid)


def search(
    fd: int,
    tree: int,
    *,
    objectids: tuple[int, int] = (0, _MAX64),
    types: tuple[int, int] = (0, 255),
    offsets: tuple[int, int] = (0, _MAX64),
    min_transid: int = 0,
) -> Iterator[Item]:
    """The items of ``tree`` (0: the one of ``fd``'s subvolume) whose key lies between the given limits, in key order.

    ``min_transid`` leaves out tree blocks that no transaction since then has written. Needs CAP_SYS_ADMIN.
    """
    (objectid, last_objectid), (kind, last_kind), (offset, last_offset) = objectids, types, offsets
    size = 1 << 16
    while True:
        limits = (tree, objectid, last_objectid, offset, last_offset, min_transid, _MAX64)
        buffer = bytearray(112 + size)
        struct.pack_into("=7QIIII32xQ", buffer, 0, *limits, kind, last_kind, 1 << 20, 0, size)
        fcntl.ioctl(fd, _TREE_SEARCH_V2, buffer)
        (count,) = struct.unpack_from("=I", buffer, 64)
        if not count:
            return
        place = 112
        for _ in range(count):
            transid, objectid, offset, kind, length = struct.unpack_from("=QQQII", buffer, place)
            place += 32
            # The kernel compares whole keys, so that items outside the limits of type and offset come along.
            if types[0] <= kind <= types[1] and offsets[0] <= offset <= offsets[1]:
                yield Item(objectid, kind, offset, transid, bytes(buffer[place : place + length]))
            place += length
        # Go on with the key that follows the last one.
        objectid, kind, offset = _next_key(objectid, kind, offset)
        if objectid > last_objectid:
            return


def enable_quota(fd: int) -> None:
    """Switch quota groups on for the file system; on already is no error."""
    fcntl.ioctl(fd, _QUOTA_CTL, bytearray(struct.pack("=QQ", _QUOTA_ENABLE, 0)))


def wait_for_rescan(fd: int) -> None:
    """Wait until the quota groups' numbers hold for what was there before they were switched on."""
    fcntl.ioctl(fd, _QUOTA_RESCAN_WAIT)


def limit(fd: int, *, referenced: int | None = None, exclusive: int | None = None) -> None:
    """Limit the bytes of the subvolume ``fd``; None takes a limit away. ENOTCONN or ENOENT: quota is off."""
    unset = _MAX64
    values = (unset if referenced is None else referenced, unset if exclusive is None else exclusive)
    request = struct.pack("=QQQQQQ", 0, _MAX_RFER | _MAX_EXCL, *values, 0, 0)
    fcntl.ioctl(fd, _QGROUP_LIMIT, bytearray(request))


def quota_group(fd: int, subvolume: int) -> QuotaGroup | None:
    """The usage of a subvolume by its ID as of the last transaction (see `sync`); None where quota is off."""
    try:
        kind, number = (QGROUP_INFO_KEY, QGROUP_INFO_KEY), (subvolume, subvolume)
        for item in search(fd, QUOTA_TREE, objectids=(0, 0), types=kind, offsets=number):
            _, referenced, _, exclusive, _ = struct.unpack("<5Q", item.data)
            return QuotaGroup(referenced, exclusive)
    except OSError as error:
        if error.errno != errno.ENOENT:  # no quota tree
            raise
    return None


def destroy_quota_group(fd: int, subvolume: int) -> None:
    """Remove what a deleted subvolume leaves in the quota tree; EBUSY while it still refers to anything."""
    try:
        fcntl.ioctl(fd, _QGROUP_CREATE, struct.pack("=QQ", 0, subvolume))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTCONN):
            raise


def resize(fd: int, size: int | None = None) -> None:
    """Resize the mounted file system to ``size`` bytes, or to its whole device."""
    text = b"max" if size is None else str(size).encode()
    fcntl.ioctl(fd, _RESIZE, bytearray(struct.pack("=q4088s", 0, text)))


def sync(fd: int) -> None:
    """Commit the current transaction."""
    fcntl.ioctl(fd, _SYNC)


def _flags(fd: int) -> int:
    buffer = bytearray(8)
    fcntl.ioctl(fd, _GETFLAGS, buffer)
    return int.from_bytes(buffer, "little")


def _name(name: str | bytes, longest: int) -> bytes:
    raw = os.fsencode(name)
    if not raw or b"\0" in raw or b"/" in raw or len(raw) > longest:
        raise OSError(errno.EINVAL, "no name for a subvolume", os.fsdecode(raw))
    return raw


def _located(fd: int, tree: int, directory: int) -> tuple[bytes, bytes]:
    buffer = bytearray(4096)
    struct.pack_into("=QQ", buffer, 0, directory, tree)
    fcntl.ioctl(fd, _INO_LOOKUP_USER, buffer)
    name, path = struct.unpack_from("=256s3824s", buffer, 16)
    return path.split(b"\0", 1)[0].rstrip(b"/") or b".", name.split(b"\0", 1)[0]


def _next_key(objectid: int, kind: int, offset: int) -> tuple[int, int, int]:
    if offset < _MAX64:
        return objectid, kind, offset + 1
    if kind < 255:
        return objectid, kind + 1, 0
    return objectid + 1, 0, 0
