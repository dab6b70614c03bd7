"""The directories of a tree that a layer is being unpacked into, found without ever leaving it.

Every path is walked one component at a time by descriptors opened with ``O_NOFOLLOW``, so that no name, link or order
of entries can lead out of the root. Symbolic links are followed here and not by the kernel, because it matters who
made them. A limited number of descriptors is kept open for the entries that follow.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Final

from layerfs import xattrs
from layerfs.errors import BadLayer, LayerfsError
from layerfs.tar.header import label
from layerfs.treecopy import remove_tree

_OPEN_AT_ONCE: Final = 128
_MAX_LINKS: Final = 40  # as the kernel's own limit, see path_resolution(7)
_LONGEST_PATH: Final = 4096
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

DEFAULT_ACL: Final = "system.posix_acl_default"


class NeedsParents(LayerfsError):
    """The layer cannot be applied to a union's upper directory alone; apply it to the merged tree instead."""


class Refused(Exception):
    """Why the entry at hand is refused; the text goes on after the entry's name."""


class NotADirectory(Refused):
    """What stands on the way to an entry is no directory and no link to one."""


class Through(enum.IntEnum):
    """What kind of symbolic links the way to a directory leads through."""

    NOTHING = 0
    OWN = 1
    """Only links that the layer itself has brought."""
    LOWER = 2


class Directory:
    """A directory of the tree that the layer has touched.

    Attributes:
        fd: its descriptor, or -1.
        fresh: it was made by this layer, so that everything in it is this layer's.
        names: what this layer has put into it, where it is not fresh.
        entry: the layer has an entry for it.
        kept: it, or something below it, is of this layer (it was not only looked into).
        cut: a whiteout of this layer hides the parent's directory of the same path.
        times: access and modification time (ns) that it gets at the end.
        inherits: new files in it do not simply get the mode and owner they are made with.
        default_acl: to be set at the end, so that it is not inherited before.
        gone: it has been replaced.
    """

    __slots__ = (
        "children",
        "cut",
        "default_acl",
        "entry",
        "fd",
        "fresh",
        "gone",
        "inherits",
        "kept",
        "name",
        "names",
        "parent",
        "times",
    )

    def __init__(self, parent: Directory | None, name: bytes, fd: int, fresh: bool) -> None:
        self.parent = parent
        self.name = name
        self.fd = fd
        self.fresh = fresh
        self.names: set[bytes] = set()
        self.children: dict[bytes, Directory] = {}
        self.times: tuple[int, int] = (0, 0)
        self.entry = self.kept = self.cut = self.inherits = self.gone = False
        self.default_acl: bytes | None = None

    def path(self, name: bytes = b"") -> bytes:
        """The path from the root, of the directory or of ``name`` in it."""
        parts = [name] if name else []
        directory: Directory | None = self
        while directory is not None and directory.parent is not None:
            parts.append(directory.name)
            directory = directory.parent
        return b"/".join(reversed(parts))

    def has(self, name: bytes) -> bool:
        """Whether ``name``, which exists, is of this layer."""
        return self.fresh or name in self.names

    def note_inheritance(self, mode: int, gid: int) -> None:
        """Work out `inherits` from the directory's own mode and group.

        The group is inherited from a set-group-ID directory, and everywhere on a file system mounted with grpid.
        """
        self.inherits = bool(mode & stat.S_ISGID) or gid != os.getegid()


class ConfinedTree:
    """The directories below ``root``, which nobody else writes to meanwhile.

    Args:
        root: a directory descriptor; it stays the caller's.
        upper: the tree is a union's upper directory, so that what is not in it may still exist.

    Attributes:
        by_path: directories by the path that entries name them with; only checked paths without links are in it.
        skipped: (path, reason) of what could not be set here.
    """

    def __init__(self, root: int, *, upper: bool) -> None:
        self.upper = upper
        self.skipped: list[tuple[bytes, str]] = []
        self._open: list[Directory] = []
        self.root = Directory(None, b"", os.open(".", _FLAGS, dir_fd=root), fresh=False)
        self.root.kept = True
        self.by_path: dict[bytes, Directory] = {b"": self.root}
        _look(self.root)

    def close(self) -> None:
        """Give back all descriptors."""
        self._close_all()
        os.close(self.root.fd)

    def relax(self) -> None:
        """Close descriptors where there are many; none that `fd` gave is to be used afterwards."""
        if len(self._open) > _OPEN_AT_ONCE:
            self._close_all()

    def _close_all(self) -> None:
        for directory in self._open:
            os.close(directory.fd)
            directory.fd = -1
        self._open.clear()

    def fd(self, directory: Directory) -> int:
        """The descriptor of a directory, opened again from its nearest open ancestor where it was closed."""
        if directory.fd >= 0:
            return directory.fd
        chain = [directory]
        while (ancestor := chain[-1].parent) is not None and ancestor.fd < 0:
            chain.append(ancestor)
        assert ancestor is not None
        fd = ancestor.fd
        for step in reversed(chain):
            above = fd
            try:
                fd = os.open(step.name, _FLAGS, dir_fd=above)
            finally:
                if above != ancestor.fd:
                    os.close(above)
        directory.fd = fd
        self._open.append(directory)
        return fd

    def find(self, path: bytes, *, create: bool = True) -> tuple[Directory, Through]:
        """The directory ``path`` as an entry names it, and what links led to it.

        Where it is not there it is made, or, without ``create``, is `FileNotFoundError`. A link of the layer itself
        may not leave the layer. One that was there before is followed as inside a container: absolute and climbing
        targets stay in the root. Raises `Refused`, and `NeedsParents` for a link in a union's upper.
        """
        found = self.by_path.get(path)
        if found is not None:
            return found, Through.NOTHING
        steps = [(name, False) for name in reversed(components(path))]
        directory = self.root
        links = 0
        through = Through.NOTHING
        while steps:
            name, own = steps.pop()
            if name == b"..":
                if directory.parent is None and own:
                    raise Refused(f"leads out of the layer through a link in {quoted(path)}")
                directory = directory.parent or directory
                continue
            try:
                child = directory.children.get(name) or self._enter(directory, name, create=create and not links)
            except FileNotFoundError:
                if not (links and create):
                    raise
                if self.upper:
                    break
                missing = quoted(directory.path(name))
                raise Refused(f"leads through a link to {missing}, which does not exist") from None
            if child is not None:
                directory = child
                directory.kept = directory.kept or create
                continue
            links += 1
            if links > _MAX_LINKS:
                raise Refused(f"leads through too many links in {quoted(path)}")
            own = directory.has(name)
            through = max(through, Through.OWN if own else Through.LOWER)
            target = os.readlink(name, dir_fd=self.fd(directory))
            if target.startswith(b"/"):
                if own:
                    raise Refused(f"leads out of the layer through the link {quoted(directory.path(name))}")
                directory = self.root
            steps += [(part, own) for part in reversed(target.split(b"/")) if part not in (b"", b".")]
        if links:
            if self.upper:
                raise NeedsParents(f"the path {quoted(path)} leads through a link")
        elif create:
            self.by_path[path.rstrip(b"/")] = directory
        return directory, through

    def _enter(self, parent: Directory, name: bytes, *, create: bool) -> Directory | None:
        """The directory ``name`` in ``parent``, perhaps made; None where it is a symbolic link."""
        self.relax()
        parent_fd = self.fd(parent)
        fresh = False
        try:
            fd = os.open(name, _FLAGS, dir_fd=parent_fd)
        except FileNotFoundError:
            if not create:
                raise
            os.mkdir(name, 0o755, dir_fd=parent_fd)
            fresh = True
            fd = os.open(name, _FLAGS, dir_fd=parent_fd)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            if stat.S_ISLNK(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode):
                return None
            raise NotADirectory(f"is below {quoted(parent.path(name))}, which is no directory") from None
        directory = parent.children[name] = Directory(parent, name, fd, fresh)
        self._open.append(directory)
        if fresh:
            self.make_plain(directory)
            if not parent.fresh:
                parent.names.add(name)
        else:
            _look(directory)
        return directory

    def make_plain(self, directory: Directory) -> None:
        """Give a directory what one without an entry gets."""
        fd = self.fd(directory)
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o755)
        self.set_attributes(fd, directory.path(), {})
        directory.times = (0, 0)
        directory.default_acl = None
        directory.kept = True
        directory.note_inheritance(0o755, 0)

    def remove(self, parent: Directory, name: bytes) -> None:
        """Remove ``name``, if it is there, with all below it and all that is known about that."""
        child = parent.children.pop(name, None)
        if child is not None:
            self._forget(child)
        fd = self.fd(parent)
        try:
            os.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            remove_tree(fd, name)

    def _forget(self, directory: Directory) -> None:
        gone = [directory]
        while gone:
            directory = gone.pop()
            directory.gone = True
            gone += directory.children.values()
            directory.children.clear()
        self._close_all()
        self.by_path.clear()
        self.by_path[b""] = self.root

    def set_attributes(self, target: int | str, path: bytes, wanted: Mapping[str, bytes]) -> None:
        """Make ``wanted`` the only kept attributes of a file; those that are no part of layers stay as they are.

        What this user namespace or file system does not allow is noted in `skipped`.
        """
        try:
            present = os.listxattr(target)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            present = []
        for name in present:
            if name not in wanted and xattrs.kept(name):
                os.removexattr(target, name)
        for name, value in wanted.items():
            if xattrs.kept(name):
                self.set_attribute(target, path, name, value)

    def set_attribute(self, target: int | str, path: bytes, name: str, value: bytes) -> None:
        """Set one attribute, or note in `skipped` that it cannot be set here."""
        try:
            os.setxattr(target, name, value)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP):
                raise
            self.skipped.append((path, f"the attribute {name} cannot be set here: {error.strerror}"))

    def finish(self) -> list[bytes]:
        """Set what has to come last (times, and what would have been inherited); the paths of implied directories."""
        implied = []
        todo = [self.root]
        while todo:
            directory = todo.pop()
            todo += directory.children.values()
            if not directory.kept:
                continue
            self.relax()
            if directory.default_acl is not None:
                self._set_default_acl(directory, directory.default_acl)
            parent = directory.parent
            if parent is None:
                os.utime(directory.fd, ns=directory.times)
            else:
                os.utime(directory.name, ns=directory.times, dir_fd=self.fd(parent), follow_symlinks=False)
            if directory.fresh and not (directory.entry or directory.cut):
                implied.append(directory.path())
        return implied

    def _set_default_acl(self, directory: Directory, value: bytes) -> None:
        path = directory.path()
        try:
            self.set_attribute(self.fd(directory), path, DEFAULT_ACL, value)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise BadLayer(f"{label(path)} has a default ACL that is none") from error


def _look(directory: Directory) -> None:
    """Note what a directory that was there already has."""
    status = os.fstat(directory.fd)
    directory.times = (status.st_atime_ns, status.st_mtime_ns)
    directory.note_inheritance(status.st_mode, status.st_gid)
    try:
        os.getxattr(directory.fd, DEFAULT_ACL)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP):
            raise
    else:
        directory.inherits = True


def components(path: bytes) -> list[bytes]:
    """The names that a path of the archive is made of. Raises `Refused` where it is absolute, climbs or is too long."""
    if path.startswith(b"/"):
        raise Refused(f"has the absolute path {quoted(path)}")
    if len(path) > _LONGEST_PATH:
        raise Refused("has a name that is too long")
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise Refused(f"has '..' in the path {quoted(path)}")
    return parts


def exists(dir_fd: int, name: bytes) -> bool:
    """Whether there is anything of that name, a dangling link included."""
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def opened(name: bytes | str, flags: int, dir_fd: int) -> Iterator[int]:
    """A descriptor of ``name``, which is not followed, for the length of a block."""
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def quoted(path: bytes) -> str:
    """A path for messages."""
    return label(path).removeprefix("entry ")
