"""Copy-up: bringing what lies in a lower branch into the upper, whole or not at all.

A copy is made in the work directory under a name of its own and renamed when it is complete, so that a daemon that dies
leaves nothing half copied in the upper. All names of a hard-linked file are copied up together: what is written through
one shows under every other, now and in every layer above. The directories that the copies go to keep their times.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Final

from layerfs.drivers.aufs import dialect
from layerfs.drivers.aufs.dialect import keeping_times
from layerfs.drivers.aufs.jobs import Job, Pending
from layerfs.drivers.aufs.places import Place
from layerfs.drivers.aufs.tree import Dir, Node, Tree
from layerfs.treecopy import copy_attributes, copy_file, remove_tree

_INLINE: Final = 256 << 10
"""Files up to this size are copied at once: a thread would take longer than the copy."""
_SLICE: Final = 0.02
"""Seconds for which a large directory is copied up before others get their turn."""


class CopyUp:
    """Copies up for one tree.

    Args:
        work: a descriptor of an empty directory on the file system of the upper; None where the union is read-only.
    """

    def __init__(self, tree: Tree, work: int | None) -> None:
        self._tree = tree
        self._work = work
        self._number = 0
        self._jobs: dict[Node, Job] = {}
        self._movers: dict[Dir, Iterator[Job]] = {}
        self._linked: dict[Place, dict[int, list[bytes]]] = {}

    @property
    def work(self) -> int:
        """The work directory. Raises `OSError` (EROFS) where the union is read-only."""
        if self._work is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self._work

    def temporary(self) -> bytes:
        """A new name for the work directory."""
        self._number += 1
        return b"%d" % self._number

    def upper(self, directory: Dir) -> int:
        """A descriptor of the upper's directory, which is made with those above it where it is not there."""
        self._directory(directory)
        assert directory.upper is not None
        return self._tree.places.fd(directory.upper)

    def node(self, node: Node, *, contents: bool = True) -> None:
        """Have the real file or directory in the upper. Raises `Pending` where that takes long.

        Without ``contents`` a regular file comes empty.
        """
        if not node.lower:
            return
        if isinstance(node, Dir):
            self._directory(node)
        else:
            self._file(node, contents)

    def everything(self, top: Dir) -> None:
        """Have a directory with all that is below it in the upper alone. Raises `Pending`, often."""
        if not top.lowers:
            return
        if top not in self._movers:
            self._movers[top] = self._bring(top)
        try:
            job = next(self._movers[top], None)
        except BaseException:
            del self._movers[top]
            raise
        if job is not None:
            raise Pending(job)
        del self._movers[top]

    def _bring(self, top: Dir) -> Iterator[Job]:
        """`everything`, step by step; yields what is to be waited for. Nothing new shows through meanwhile."""
        ends = time.monotonic() + _SLICE
        done = [top]
        for directory in done:  # it grows
            self._tree.load(directory)
            if self._tree.is_gone(directory):
                continue
            self._directory(directory)
            for name in list(directory.visible()):
                if time.monotonic() > ends:
                    yield Job(None)
                    ends = time.monotonic() + _SLICE
                if not directory.above.get(name, directory.has_below(name)):
                    continue  # it is a file of the upper, or gone
                node = self._tree.get(directory, name)
                while node.lower and node.names:
                    try:
                        self.node(node)
                    except Pending as pending:
                        yield pending.job
                if isinstance(node, Dir) and node.lowers:
                    done.append(node)
            self._tree.places.relax()
        dialect.make_opaque(self.upper(top))
        for directory in reversed(done):
            directory.lowers = []
            directory.below = {}
            for child in list(directory.children.values()):
                self._tree.discard_unknown(child)

    # Directories

    def _directory(self, directory: Dir) -> None:
        if directory.upper is not None:
            return
        missing = [directory]
        while missing[-1].names and missing[-1].parent.upper is None:
            missing.append(missing[-1].parent)
        for each in reversed(missing):
            if not each.names:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._one_directory(each)

    def _one_directory(self, directory: Dir) -> None:
        name = self.temporary()
        os.umask(0)  # whoever made something last may have had another
        os.mkdir(name, 0o700, dir_fd=self.work)
        try:
            source = self._tree.places.fd(directory.lowers[0])
            old = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=source)
            new = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.work)
            try:
                copy_attributes(old, new)
                info = os.fstat(new)
            finally:
                os.close(old)
                os.close(new)
            parent = directory.parent
            assert parent.upper is not None
            target = self._tree.places.fd(parent.upper)
            keeping_times(target, lambda: os.rename(name, directory.name, src_dir_fd=self.work, dst_dir_fd=target))
        except BaseException:
            remove_tree(self.work, name)
            raise
        parent.above[directory.name] = True
        directory.upper = Place(parent.upper, directory.name)
        directory.at, directory.named, directory.lower = parent.upper, directory.name, False
        self._tree.keep_number(directory, (info.st_dev, info.st_ino))

    # Files

    def _file(self, node: Node, contents: bool) -> None:
        if node in self._jobs:
            raise Pending(self._jobs[node])
        info = self._tree.status(node)
        name = self.temporary()
        work = self.work
        more_names = info.st_nlink - node.unlinked > len(node.names)
        if info.st_size <= _INLINE or not contents:
            if more_names:
                self._find_names(node)
            copy_file(self._tree.place_fd(node), node.named, work, name, info=info, contents=contents)
            self._place(node, name)
            return
        source = os.dup(self._tree.place_fd(node))

        def copy() -> None:
            copy_file(source, node.named, work, name, info=info)

        def place(job: Job) -> None:
            os.close(source)
            del self._jobs[node]
            if job.error is None and node.lower:
                if more_names:
                    self._find_names(node)
                self._place(node, name)
            else:
                dialect.take_away(work, name)

        job = self._jobs[node] = Job(copy, place)
        raise Pending(job)

    def _place(self, node: Node, name: bytes) -> None:
        """Give the copy ``name`` in the work directory all names that the file has."""
        work = self.work
        try:
            info = os.stat(name, dir_fd=work, follow_symlinks=False)
            for directory, known in node.names[1:]:
                target = self.upper(directory)
                keeping_times(target, partial(_link, work, name, target, known))
                directory.above[known] = False
            if node.names:
                directory, known = node.names[0]
                target = self.upper(directory)
                assert directory.upper is not None
                keeping_times(target, lambda: os.rename(name, known, src_dir_fd=work, dst_dir_fd=target))
                directory.above[known] = False
                node.at, node.named = directory.upper, known
            else:
                node.orphan = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=work)
                os.unlink(name, dir_fd=work)
        except BaseException:
            dialect.take_away(work, name)
            raise
        node.lower = False
        node.unlinked = 0
        self._tree.keep_number(node, (info.st_dev, info.st_ino))
        self._reopen(node)

    def _reopen(self, node: Node) -> None:
        """Let the descriptors that are open on the lower file lead to the copy, under the same numbers."""
        for fd in node.fds:
            new = os.open(self._tree.path(node), os.O_RDONLY | os.O_CLOEXEC)
            os.dup2(new, fd, inheritable=False)
            os.close(new)

    def _find_names(self, node: Node) -> None:
        """Make all names known that a lower file shows under. The branch is searched once for all such files."""
        root = node.at
        while root.parent is not None:
            root = root.parent
        if root not in self._linked:
            self._linked[root] = _several_names(root.fd)
        for path in self._linked[root].get(node.real[1], ()):
            directory: Node = self._tree.root
            for part in path.split(b"/"):
                found = self._tree.find(directory, part) if isinstance(directory, Dir) else None
                if found is None:
                    break
                directory = found[0]


def _link(source: int, name: bytes, target: int, new: bytes) -> None:
    os.link(name, new, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)


def _several_names(root: int) -> dict[int, list[bytes]]:
    """The paths of all files below ``root`` that have several names, by inode number."""
    from layerfs.walk import walk  # late: few unions need it, and it would make every start slower

    found: dict[int, list[bytes]] = {}
    device = os.stat(root).st_dev
    for path, _, entries in walk(root):
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                continue
            info = entry.stat(follow_symlinks=False)
            if info.st_nlink > 1 and info.st_dev == device:
                name = os.fsencode(entry.name)
                found.setdefault(info.st_ino, []).append(path + b"/" + name if path else name)
    return {ino: paths for ino, paths in found.items() if len(paths) > 1}
