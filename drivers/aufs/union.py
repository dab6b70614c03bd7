"""What each operation on names does to the upper and to what is known of the merged tree.

Nothing is changed before all that is needed has been copied up, because that may raise `Pending`. On disk, each step
leaves what users should see or what they saw before: a whiteout comes before what it replaces goes, since entries of
the upper are not hidden by it, and goes after what replaces it has come.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Final, NamedTuple

from layerfs.drivers.aufs import dialect
from layerfs.drivers.aufs.copyup import CopyUp
from layerfs.drivers.aufs.tree import LONGEST_NAME, Dir, Node, Tree
from layerfs.kernel.libc import check, encoded, libc
from layerfs.treecopy import remove_tree

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
_SPECIAL_BITS: Final = stat.S_ISUID | stat.S_ISGID


class Caller(NamedTuple):
    """Who an operation is for."""

    uid: int
    gid: int


class Union:
    """Changes one merged tree."""

    def __init__(self, tree: Tree, copyup: CopyUp) -> None:
        self._tree = tree
        self._copyup = copyup
        self._own = Caller(os.geteuid(), os.getegid())

    # Making

    def create(
        self, directory: Dir, name: bytes, flags: int, mode: int, umask: int, caller: Caller
    ) -> tuple[Node, os.stat_result, int]:
        """Make a regular file and open it; the node, its status and a descriptor."""
        upper = self._prepare(directory, name)
        os.umask(umask)
        flags = flags & ~(os.O_ACCMODE | os.O_APPEND | os.O_DIRECT | os.O_TRUNC) | os.O_RDWR
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode & 0o7777, dir_fd=upper)
        try:
            info = os.fstat(fd)
            if caller != self._own:
                info = self._give(upper, b"/proc/self/fd/%d" % fd, info, caller)
        except BaseException:
            os.close(fd)
            os.unlink(name, dir_fd=upper)
            raise
        return self._made(directory, name, info), info, fd

    def unnamed(
        self, directory: Dir, flags: int, mode: int, umask: int, caller: Caller
    ) -> tuple[Node, os.stat_result, int]:
        """Make a regular file without a name (O_TMPFILE) and open it; the node, its status and a descriptor."""
        upper = self._copyup.upper(directory)
        os.umask(umask)
        flags = flags & ~(os.O_ACCMODE | os.O_APPEND | os.O_DIRECT | os.O_CREAT) | os.O_RDWR | os.O_CLOEXEC
        fd = os.open(".", flags | os.O_TMPFILE, mode & 0o7777, dir_fd=upper)
        try:
            info = os.fstat(fd)
            if caller != self._own:
                info = self._give(upper, b"/proc/self/fd/%d" % fd, info, caller)
            return self._tree.add_unnamed(fd, info), info, fd
        except BaseException:
            os.close(fd)
            raise

    def mknod(
        self, directory: Dir, name: bytes, mode: int, device: int, umask: int, caller: Caller
    ) -> tuple[Node, os.stat_result]:
        def make(upper: int) -> None:
            os.umask(umask)
            os.mknod(name, mode, device, dir_fd=upper)

        return self._make(directory, name, make, caller)

    def symlink(self, directory: Dir, name: bytes, target: bytes, caller: Caller) -> tuple[Node, os.stat_result]:
        return self._make(directory, name, lambda upper: os.symlink(target, name, dir_fd=upper), caller)

    def mkdir(self, directory: Dir, name: bytes, mode: int, umask: int, caller: Caller) -> tuple[Node, os.stat_result]:
        upper = self._prepare(directory, name)
        os.umask(umask)
        if name not in directory.below:
            os.mkdir(name, mode & 0o7777, dir_fd=upper)
        else:
            self._make_opaque_directory(upper, name, mode & 0o7777)
        try:
            info = os.stat(name, dir_fd=upper, follow_symlinks=False)
            if caller != self._own:
                info = self._give(upper, name, info, caller)
        except BaseException:
            remove_tree(upper, name)
            raise
        return self._made(directory, name, info), info

    def link(self, node: Node, directory: Dir, name: bytes) -> os.stat_result:
        self._check_free(directory, name)
        self._copyup.node(node)
        upper = self._copyup.upper(directory)
        if node.orphan >= 0:
            os.link(b"/proc/self/fd/%d" % node.orphan, name, dst_dir_fd=upper, follow_symlinks=True)
            os.close(node.orphan)
            node.orphan = -1
            assert directory.upper is not None
            node.at, node.named = directory.upper, name
        else:
            source = self._tree.place_fd(node)
            os.link(node.named, name, src_dir_fd=source, dst_dir_fd=upper, follow_symlinks=False)
        self._tree.name(node, directory, name)
        self._unhide(directory, name)
        return self._tree.status(node)

    # Removing

    def unlink(self, directory: Dir, name: bytes) -> None:
        node = self._tree.get(directory, name)
        self._make_hideable(directory, name)
        upper = self._copyup.upper(directory)
        self._tree.hold(node)
        was_lower = node.lower
        self._hide(directory, name)
        if name in directory.above:
            os.unlink(name, dir_fd=upper)
        self._tree.unname(directory, name)
        if was_lower:
            node.unlinked += 1

    def rmdir(self, directory: Dir, name: bytes) -> None:
        node = self._tree.get(directory, name)
        if not isinstance(node, Dir):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        self._check_empty(node)
        self._make_hideable(directory, name)
        upper = self._copyup.upper(directory)
        self._tree.hold(node)
        self._hide(directory, name)
        if name in directory.above:
            self._remove_directory(upper, name)
        self._tree.unname(directory, name)

    # Renaming

    def rename(self, old: Dir, name: bytes, new: Dir, new_name: bytes, flags: int) -> None:
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        node = self._tree.get(old, name)
        self._check_name(new_name)
        found = self._tree.find(new, new_name)
        target = found[0] if found else None
        if flags & RENAME_NOREPLACE and target is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if flags & RENAME_EXCHANGE:
            if target is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._exchange((old, name, node), (new, new_name, target))
            return
        if target is node:
            return
        if isinstance(target, Dir):
            self._check_empty(target)
        self._make_hideable(old, name)
        was_merged = isinstance(node, Dir) and bool(node.lowers)
        self._bring(node)
        source, place = self._copyup.upper(old), self._copyup.upper(new)
        self._separate(node, new, new_name)
        if target is not None:
            self._tree.hold(target)
        self._hide(old, name)
        if isinstance(target, Dir) and new_name in new.above:
            # It may hold whiteouts, over which rename(2) does not go.
            _renameat2(source, name, place, new_name, RENAME_EXCHANGE)
            self._remove_directory(source, name)
        else:
            os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=place)
        if target is not None:
            if target.lower:
                target.unlinked += 1
            self._tree.unname(new, new_name)
        self._renamed(node, old, name, new, new_name)
        self._unhide(new, new_name)
        if was_merged and isinstance(node, Dir) and new_name not in new.below:
            dialect.take_opaque(self._copyup.upper(node))

    def _exchange(self, one: tuple[Dir, bytes, Node], two: tuple[Dir, bytes, Node]) -> None:
        for _, _, node in (one, two):
            self._bring(node)
        for (_, _, node), (directory, name, _) in ((one, two), (two, one)):
            self._separate(node, directory, name)
        places = [self._copyup.upper(directory) for directory, _, _ in (one, two)]
        _renameat2(places[0], one[1], places[1], two[1], RENAME_EXCHANGE)
        for directory, name, _ in (one, two):
            self._tree.take_name(directory, name)
        for (_, _, node), (directory, name, _) in ((one, two), (two, one)):
            self._tree.name(node, directory, name)
            self._moved(node, directory, name)

    def _bring(self, node: Node) -> None:
        """Have what is to be renamed in the upper, a directory with all that is in it."""
        self._copyup.node(node)
        if isinstance(node, Dir):
            self._copyup.everything(node)

    def _separate(self, node: Node, directory: Dir, name: bytes) -> None:
        """Keep a directory from being merged with what lower branches have under the name that it is to get."""
        self._tree.load(directory)
        if isinstance(node, Dir) and name in directory.below:
            dialect.make_opaque(self._copyup.upper(node))

    def _renamed(self, node: Node, old: Dir, name: bytes, new: Dir, new_name: bytes) -> None:
        self._tree.take_name(old, name)
        self._tree.name(node, new, new_name)
        self._moved(node, new, new_name)

    def _moved(self, node: Node, directory: Dir, name: bytes) -> None:
        assert directory.upper is not None
        node.at, node.named = directory.upper, name
        if isinstance(node, Dir):
            assert node.upper is not None
            node.upper.parent, node.upper.name = directory.upper, name

    # Whiteouts

    def _make_hideable(self, directory: Dir, name: bytes) -> None:
        """Where no whiteout can have a name that long, have all else of the directory in the upper, and that opaque."""
        self._tree.load(directory)
        if len(name) > dialect.LONGEST_HIDDEN and directory.has_below(name):
            self._copyup.everything(directory)

    def _hide(self, directory: Dir, name: bytes) -> None:
        """Make a whiteout if a lower branch has the name. The directory is in the upper."""
        if directory.has_below(name):
            dialect.make(self._copyup.upper(directory), dialect.whiteout(name))
            directory.hidden.add(name)

    def _unhide(self, directory: Dir, name: bytes) -> None:
        """Remove the whiteout of a name that the upper has now. A directory of that name is opaque."""
        if name in directory.hidden:
            dialect.take_away(self._copyup.upper(directory), dialect.whiteout(name))
            directory.hidden.discard(name)

    def _remove_directory(self, upper: int, name: bytes) -> None:
        """Take a directory out of the upper in one step, with the whiteouts that it holds."""
        try:
            os.rmdir(name, dir_fd=upper)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            aside = self._copyup.temporary()
            os.rename(name, aside, src_dir_fd=upper, dst_dir_fd=self._copyup.work)
            remove_tree(self._copyup.work, aside)

    def _make_opaque_directory(self, upper: int, name: bytes, mode: int) -> None:
        """Make a directory that hides what lower branches have under its name; a whiteout still does."""
        os.mkdir(name, mode, dir_fd=upper)
        try:
            fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=upper)
            try:
                dialect.make_opaque(fd)
            finally:
                os.close(fd)
        except BaseException:
            remove_tree(upper, name)
            raise

    # Parts

    def _check_name(self, name: bytes) -> None:
        if name.startswith(dialect.PREFIX):
            raise PermissionError(errno.EPERM, "the name is reserved")
        if len(name) > LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))

    def _check_free(self, directory: Dir, name: bytes) -> None:
        self._check_name(name)
        self._tree.load(directory)
        if directory.has(name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def _check_empty(self, directory: Dir) -> None:
        self._tree.load(directory)
        if not directory.is_empty():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    def _prepare(self, directory: Dir, name: bytes) -> int:
        """A descriptor of the upper's directory in which the new ``name`` is about to be made."""
        self._check_free(directory, name)
        if self._tree.is_gone(directory):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self._copyup.upper(directory)

    def _make(
        self, directory: Dir, name: bytes, make: Callable[[int], None], caller: Caller
    ) -> tuple[Node, os.stat_result]:
        upper = self._prepare(directory, name)
        make(upper)
        try:
            info = os.stat(name, dir_fd=upper, follow_symlinks=False)
            if caller != self._own:
                info = self._give(upper, name, info, caller)
        except BaseException:
            os.unlink(name, dir_fd=upper)
            raise
        return self._made(directory, name, info), info

    def _made(self, directory: Dir, name: bytes, info: os.stat_result) -> Node:
        node = self._tree.add(directory, name, info)
        self._unhide(directory, name)
        return node

    def _give(self, upper: int, path: bytes, info: os.stat_result, caller: Caller) -> os.stat_result:
        """Give what has been made at ``path`` to whom it was made for; its status then.

        The group is the directory's where that has its set-group-ID bit.
        """
        follow = path.startswith(b"/")
        gid = -1 if os.stat(upper).st_mode & stat.S_ISGID else caller.gid
        os.chown(path, caller.uid, gid, dir_fd=upper, follow_symlinks=follow)
        if info.st_mode & _SPECIAL_BITS and not stat.S_ISDIR(info.st_mode):
            os.chmod(path, stat.S_IMODE(info.st_mode), dir_fd=upper)  # chown(2) has cleared them
        return os.stat(path, dir_fd=upper, follow_symlinks=follow)


def _renameat2(source: int, name: bytes, target: int, new_name: bytes, flags: int) -> None:
    check(libc.renameat2(source, encoded(name), target, encoded(new_name), flags), path=name)
