"""A file tree as plain data, so that two trees can be compared with ``==`` and a difference reads well."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import NamedTuple

from layerfs.kernel import xattr
from layerfs.xattrs import kept


class Node(NamedTuple):
    """What a user can see of one path, but for its inode number."""

    type: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    device: int
    content: str
    xattrs: tuple[tuple[str, bytes], ...]
    names: tuple[str, ...]
    """Every path of the inode, itself among them, where there are several."""


Tree = dict[str, Node]

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def read_tree(root: str | os.PathLike[str] | int, *, times: bool = True) -> Tree:
    """Read the tree below ``root`` (a path or a directory descriptor), sockets left out.

    Args:
        root: where it is.
        times: False leaves modification times out, for trees that were made at different moments.
    """
    base = f"/proc/self/fd/{root}" if isinstance(root, int) else os.fspath(root)
    found: dict[str, tuple[os.stat_result, str]] = {}
    names: dict[tuple[int, int], list[str]] = {}
    pending = ["."]
    while pending:
        relative = pending.pop()
        path = f"{base}/{relative}"
        info = os.lstat(path)
        if stat.S_ISSOCK(info.st_mode):
            continue
        found[relative] = (info, path)
        if stat.S_ISDIR(info.st_mode):
            pending += [name if relative == "." else f"{relative}/{name}" for name in os.listdir(path)]
        else:
            names.setdefault((info.st_dev, info.st_ino), []).append(relative)
    return {
        relative: Node(
            type=_TYPES[stat.S_IFMT(info.st_mode)],
            mode=stat.S_IMODE(info.st_mode),
            uid=info.st_uid,
            gid=info.st_gid,
            mtime_ns=info.st_mtime_ns if times else 0,
            device=info.st_rdev,
            content=_content(info, path),
            xattrs=_xattrs(path),
            names=tuple(sorted(group)) if len(group := names.get((info.st_dev, info.st_ino), [])) > 1 else (),
        )
        for relative, (info, path) in sorted(found.items())
    }


def _content(info: os.stat_result, path: str) -> str:
    if stat.S_ISLNK(info.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(info.st_mode):
        return ""
    with open(path, "rb") as file:
        return f"{info.st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    listed = sorted(filter(kept, os.listxattr(path, follow_symlinks=False)))
    return tuple((name, xattr.get(path, name, follow_symlinks=False)) for name in listed)
