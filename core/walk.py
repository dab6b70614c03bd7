"""Walking a tree by directory descriptors, and two things that need it: how much a tree occupies, and its uncaching."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from layerfs.beneath import directory
from layerfs.driver import Usage


def walk(root: int) -> Iterator[tuple[bytes, int, list[os.DirEntry[str]]]]:
    """Every directory of the tree below the directory ``root``, itself first, a parent before its children.

    Yields the path from the root, a descriptor that is open until the next step, and the entries.
    """
    todo = [b""]
    while todo:
        path = todo.pop()
        with directory(root, path) as fd:
            with os.scandir(fd) as found:
                entries = list(found)
            yield path, fd, entries
            prefix = path and path + b"/"  # while fd is open: where a directory's entries have no types, they are asked
            todo += [prefix + os.fsencode(e.name) for e in entries if e.is_dir(follow_symlinks=False)]


def uncache(root: int) -> None:
    """Drop the files below the directory ``root`` from the page cache, but for what is still to be written out.

    Raises `OSError`.
    """
    for _, fd, entries in walk(root):
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                file = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(file)


def disk_usage(root: int) -> Usage:
    """The allocated bytes and the inodes of the tree below the directory ``root``, which counts too; each inode once.

    Other file systems that are mounted inside are left out.
    """
    top = os.fstat(root)
    size, inodes = top.st_blocks * 512, 1
    linked: set[int] = set()
    for _, fd, entries in walk(root):
        if os.fstat(fd).st_dev != top.st_dev:
            continue
        for entry in entries:
            info = entry.stat(follow_symlinks=False)
            if info.st_dev != top.st_dev or info.st_ino in linked:
                continue
            if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
                linked.add(info.st_ino)
            size += info.st_blocks * 512
            inodes += 1
    return Usage(size, inodes)
