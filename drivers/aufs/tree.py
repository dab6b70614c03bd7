"""The merged tree: the files and directories that the kernel knows, and where each of them really is.

The branches below the upper never change, and the upper only through this process, so a directory is read once, when it
is first needed. What is known of one goes when the kernel forgets it.

Inode numbers are those of the real files. A file that is copied up keeps the number that it had, also after the kernel
has forgotten it; numbers of another file system than the upper's are moved out of the way of the others.
"""

from __future__ import annotations

import bisect
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Final

from layerfs.drivers.aufs.dialect import OPAQUE, PREFIX, hidden_by
from layerfs.drivers.aufs.places import Place, Places

LONGEST_NAME: Final = 255
_DEVICE_SHIFT: Final = 56
_TOMBSTONES: Final = 4096


class Node:
    """A file of any type but a directory, or, as a `Dir`, a directory.

    Attributes:
        ino: the number that the kernel and users see.
        kind: its type, as `stat.S_IFMT` gives it.
        names: the names that it is known under, as (directory, name).
        at, named: the directory of a branch and the name there of the real file.
        lower: the real file lies in a read-only branch.
        real: (device, inode number) of the real file.
        lookups: how often the kernel has been told of it.
        fds: the descriptors of the real file that are open on the kernel's behalf.
        backing: by which number the kernel reads and writes the real file itself, through all of them; or 0.
        mappable: it does so, or did, for who may have mapped the file, whose writing then changes times untold.
        orphan: an O_PATH descriptor of a real file in the upper that has no name any more, or -1.
        unlinked: how many names of a lower file have been hidden.
    """

    __slots__ = (
        "at",
        "backing",
        "fds",
        "ino",
        "kind",
        "lookups",
        "lower",
        "mappable",
        "named",
        "names",
        "orphan",
        "real",
        "unlinked",
    )

    def __init__(self, ino: int, kind: int, at: Place, named: bytes, *, lower: bool, real: tuple[int, int]) -> None:
        self.ino = ino
        self.kind = kind
        self.names: list[tuple[Dir, bytes]] = []
        self.at = at
        self.named = named
        self.lower = lower
        self.real = real
        self.lookups = 0
        self.fds: list[int] = []
        self.backing = 0
        self.mappable = False
        self.orphan = -1
        self.unlinked = 0

    @property
    def parent(self) -> Dir:
        return self.names[0][0]

    @property
    def name(self) -> bytes:
        return self.names[0][1]


class Dir(Node):
    """A directory, merged of the upper's and those of the lower branches.

    Attributes:
        upper: the upper's directory, if it has one.
        lowers: those of the lower branches that show through, nearest first.
        children: what the kernel knows of its entries.
        loaded: the three that follow are filled.
        above: the names in the upper, and whether each is a directory.
        below: the names in the lower branches, with the directory that has each, or for a directory all that do.
        hidden: the names that whiteouts of the upper hide.
        subdirectories: how many of the visible names are directories.
    """

    __slots__ = (
        "_cookies",
        "_listed",
        "_next",
        "above",
        "below",
        "children",
        "hidden",
        "loaded",
        "lowers",
        "subdirectories",
        "upper",
    )

    def __init__(
        self, ino: int, at: Place, named: bytes, *, upper: Place | None, lowers: list[Place], real: tuple[int, int]
    ) -> None:
        super().__init__(ino, stat.S_IFDIR, at, named, lower=upper is None, real=real)
        self.upper = upper
        self.lowers = lowers
        self.children: dict[bytes, Node] = {}
        self.loaded = False
        self.above: dict[bytes, bool] = {}
        self.below: dict[bytes, Place | tuple[Place, ...]] = {}
        self.hidden: set[bytes] = set()
        self.subdirectories = 0
        self._cookies: dict[bytes, int] | None = None
        self._listed: list[tuple[int, bytes]] = []
        self._next = 3

    def has_below(self, name: bytes) -> bool:
        """Whether the lower branches show ``name``, or would if the upper did not have it."""
        return name in self.below and name not in self.hidden

    def has(self, name: bytes) -> bool:
        return name in self.above or self.has_below(name)

    def visible(self) -> Iterator[bytes]:
        """Every name in it."""
        yield from self.above
        for name in self.below:
            if name not in self.above and name not in self.hidden:
                yield name

    def is_empty(self) -> bool:
        return next(self.visible(), None) is None

    # The order in which names are listed: each has a cookie, larger than those before it, that it keeps

    def listing(self, after: int) -> Iterator[tuple[int, bytes]]:
        """The names with a cookie above ``after``, and the cookies."""
        if self._cookies is None:
            self._cookies = {}
            for name in self.visible():
                self.appeared(name)
        elif len(self._listed) > 2 * len(self._cookies) + _TOMBSTONES:
            self._listed = [item for item in self._listed if self._cookies.get(item[1]) == item[0]]
        listed = self._listed
        for index in range(bisect.bisect_right(listed, after, key=_cookie), len(listed)):
            item = listed[index]
            if self._cookies.get(item[1]) == item[0]:
                yield item

    def appeared(self, name: bytes) -> None:
        """Note for the listing that there is a new name."""
        if self._cookies is not None and name not in self._cookies:
            self._cookies[name] = self._next
            self._listed.append((self._next, name))
            self._next += 1

    def disappeared(self, name: bytes) -> None:
        """Note for the listing that a name is gone."""
        if self._cookies is not None:
            self._cookies.pop(name, None)


def _cookie(item: tuple[int, bytes]) -> int:
    return item[0]


class Tree:
    """All nodes of one union.

    Args:
        upper: a descriptor of the writable branch's root, or None.
        lowers: descriptors of the read-only branches, nearest first; at least one branch there must be.
        limit: how many descriptors of directories may be open at once.

    Attributes:
        root: the union's root, which the kernel calls 1.
        nodes: what the kernel knows, by number.
    """

    def __init__(self, upper: int | None, lowers: Sequence[int], *, limit: int = 512) -> None:
        self.places = Places(limit)
        above = None if upper is None else Place(None, b".", upper)
        below = [Place(None, b".", fd) for fd in lowers]
        top = above or below[0]
        info = os.stat(top.fd)
        self._device = info.st_dev
        self._devices = {info.st_dev: 0}
        self._kept: dict[tuple[int, int], int] = {}
        self.root = Dir(1, top, b".", upper=above, lowers=below, real=(info.st_dev, info.st_ino))
        self.root.lookups = 1
        self.nodes: dict[int, Node] = {1: self.root}

    # Looking

    def load(self, directory: Dir) -> None:
        """Read a directory of all branches, once."""
        if directory.loaded:
            return
        if directory.upper is not None:
            directory.above, directory.hidden, opaque = self._scan(directory.upper)
            if opaque:
                directory.lowers = []
        below: dict[bytes, Place | tuple[Place, ...]] = {}
        ended: set[bytes] = set()
        for place in directory.lowers:
            found, hidden, opaque = self._scan(place)
            if not below and not ended:
                below = {name: (place,) if is_dir else place for name, is_dir in found.items()}
                ended = {name for name, is_dir in found.items() if not is_dir}
            else:
                for name, is_dir in found.items():
                    if name in ended:
                        continue
                    if is_dir:
                        below[name] = (*below.get(name, ()), place)  # type: ignore[misc]
                        continue
                    ended.add(name)
                    below.setdefault(name, place)
            ended |= hidden
            if opaque:
                break
        directory.below = below
        directory.loaded = True
        above, hidden = directory.above, directory.hidden
        directory.subdirectories = sum(above.values()) + sum(
            type(found) is tuple and name not in above and name not in hidden for name, found in below.items()
        )

    def find(self, directory: Dir, name: bytes) -> tuple[Node, os.stat_result] | None:
        """The entry ``name`` of a directory and its real file's status, or None. Raises `OSError`."""
        node = directory.children.get(name)
        if node is not None:
            return node, self.status(node)
        if len(name) > LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if not directory.loaded:
            self.load(directory)
        is_dir = directory.above.get(name)
        found = None if name in directory.hidden else directory.below.get(name)
        if is_dir is not None:
            assert directory.upper is not None
            at = directory.upper
        elif found is None:
            return None
        else:
            is_dir = type(found) is tuple
            at = found[0] if isinstance(found, tuple) else found
        info = os.stat(name, dir_fd=at.fd if at.fd >= 0 else self.places.fd(at), follow_symlinks=False)
        real = (info.st_dev, info.st_ino)
        ino = self._kept.get(real) or (info.st_ino if info.st_dev == self._device else self._number(real))
        lower = at is not directory.upper
        if is_dir:
            lowers = [Place(place, name) for place in found] if isinstance(found, tuple) else []
            upper = None if lower else Place(at, name)
            node = Dir(ino, at, name, upper=upper, lowers=lowers, real=real)
        else:
            known = self.nodes.get(ino)
            if known is None:
                node = Node(ino, stat.S_IFMT(info.st_mode), at, name, lower=lower, real=real)
            else:  # another name of it
                node = known
                if node.orphan >= 0:
                    os.close(node.orphan)
                    node.orphan = -1
                    node.at, node.named = at, name
        self.nodes[ino] = node
        directory.children[name] = node
        node.names.append((directory, name))
        return node, info

    def get(self, directory: Dir, name: bytes) -> Node:
        """The entry ``name``; ENOENT where there is none."""
        found = self.find(directory, name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return found[0]

    def status(self, node: Node) -> os.stat_result:
        """The real file's status."""
        if node.orphan >= 0:
            return os.stat(node.orphan)
        at = node.at
        return os.stat(node.named, dir_fd=at.fd if at.fd >= 0 else self.places.fd(at), follow_symlinks=False)

    def is_gone(self, node: Node) -> bool:
        """Whether a node has no name any more that is known."""
        return not node.names and node is not self.root

    def links(self, node: Node, info: os.stat_result) -> int:
        """The link count that users see."""
        if isinstance(node, Dir):
            if self.is_gone(node):
                return 0
            # A directory of one branch alone is as it is; 1 is what some file systems say of all directories.
            if info.st_nlink > 1 and len(node.lowers) + (node.upper is not None) > 1:
                self.load(node)
                return 2 + node.subdirectories
            return info.st_nlink
        return info.st_nlink - node.unlinked

    def place_fd(self, node: Node) -> int:
        """A descriptor of the branch's directory that the real file lies in."""
        return self.places.fd(node.at)

    def path(self, node: Node) -> bytes:
        """A path of the real file for system calls that take no directory descriptor; its last part may be a link."""
        if node.orphan >= 0:
            return b"/proc/self/fd/%d" % node.orphan
        return b"/proc/self/fd/%d/%s" % (self.places.fd(node.at), node.named)

    # Changing what is known

    def keep_number(self, node: Node, real: tuple[int, int]) -> None:
        """Let the number stay when the real file becomes another one."""
        self._kept.pop(node.real, None)
        if self._number(real) != node.ino:
            self._kept[real] = node.ino
        node.real = real

    def hold(self, node: Node) -> None:
        """Get hold of the real file of a node that is about to lose its only known name. A lower one keeps its name."""
        if not node.lower and node.orphan < 0 and len(node.names) <= 1 and node.lookups:
            node.orphan = os.open(node.named, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.place_fd(node))

    def unname(self, directory: Dir, name: bytes) -> Node:
        """Take from what is known a name that the file has lost, and return its node."""
        node = self.take_name(directory, name)
        if node.names and not node.lower:
            parent, node.named = node.names[0]
            assert parent.upper is not None
            node.at = parent.upper
        if not node.names:
            if node.real in self._kept and (node.orphan < 0 or os.stat(node.orphan).st_nlink == 0):
                del self._kept[node.real]
            if isinstance(node, Dir) and node.upper is not None:
                self.places.drop(node.upper)
            self.discard_unknown(node)
        return node

    def take_name(self, directory: Dir, name: bytes) -> Node:
        """Forget one name of a node that is known, and return the node."""
        node = directory.children.pop(name)
        directory.above.pop(name, None)
        directory.subdirectories -= node.kind == stat.S_IFDIR
        directory.disappeared(name)
        node.names.remove((directory, name))
        return node

    def add(self, directory: Dir, name: bytes, info: os.stat_result) -> Node:
        """A file or directory that has just been made in the upper."""
        assert directory.upper is not None
        real = (info.st_dev, info.st_ino)
        self._kept.pop(real, None)
        ino = self._number(real)
        if stat.S_ISDIR(info.st_mode):
            node: Node = Dir(ino, directory.upper, name, upper=Place(directory.upper, name), lowers=[], real=real)
        else:
            node = Node(ino, stat.S_IFMT(info.st_mode), directory.upper, name, lower=False, real=real)
        self.nodes[ino] = node
        self.name(node, directory, name)
        return node

    def add_unnamed(self, fd: int, info: os.stat_result) -> Node:
        """A file that has just been made in the upper, open as ``fd``, without a name."""
        real = (info.st_dev, info.st_ino)
        node = Node(self._number(real), stat.S_IFREG, self.root.at, b"", lower=False, real=real)
        node.orphan = os.open(b"/proc/self/fd/%d" % fd, os.O_PATH | os.O_CLOEXEC)
        self.nodes[node.ino] = node
        return node

    def name(self, node: Node, directory: Dir, name: bytes) -> None:
        """Note a new name, in the upper, of a node."""
        directory.children[name] = node
        is_dir = directory.above[name] = node.kind == stat.S_IFDIR
        directory.subdirectories += is_dir
        directory.appeared(name)
        node.names.append((directory, name))

    def forget(self, ino: int, lookups: int) -> None:
        """The kernel does not know the node any more, as often as said."""
        node = self.nodes.get(ino)
        if node is None:
            return
        node.lookups -= lookups
        self.discard_unknown(node)

    def discard_unknown(self, node: Node) -> None:
        """Forget a node that was looked at but is not known to the kernel."""
        if node.lookups <= 0 and not node.fds and node is not self.root:
            self._discard(node)

    def _discard(self, node: Node) -> None:
        if isinstance(node, Dir):
            for child in list(node.children.values()):
                self.discard_unknown(child)
            if node.children:
                return  # the kernel is about to forget those too
        if node.orphan >= 0:
            os.close(node.orphan)
            node.orphan = -1
        if self.nodes.get(node.ino) is node:
            del self.nodes[node.ino]
        names, node.names = node.names, []
        for directory, name in names:
            if directory.children.get(name) is node:
                del directory.children[name]
                if not directory.children:
                    self.discard_unknown(directory)

    # Numbers and branches

    def _number(self, real: tuple[int, int]) -> int:
        device, ino = real
        index = self._devices.get(device)
        if index is None:
            index = self._devices[device] = len(self._devices)
        number = ino ^ index << _DEVICE_SHIFT if index else ino
        return number if number != 1 else 1 << _DEVICE_SHIFT - 1

    def _scan(self, place: Place) -> tuple[dict[bytes, bool], set[bytes], bool]:
        """What a directory of a branch has: names with whether each is a directory, hidden names, whether opaque."""
        found: dict[bytes, bool] = {}
        hidden: set[bytes] = set()
        opaque = False
        with os.scandir(b"/proc/self/fd/%d" % self.places.fd(place)) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(PREFIX):
                    if name == OPAQUE:
                        opaque = True
                    elif hides := hidden_by(name):
                        hidden.add(hides)
                else:
                    found[name] = entry.is_dir(follow_symlinks=False)
        return found, hidden, opaque
