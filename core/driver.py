"""The driver interface: what one storage backend can do, and nothing above it.

A driver keeps *volumes*: the backend's own form of a layer (a directory, a subvolume, a dataset, a thin device). The
store gives each volume a short name (``[0-9a-z]+``) that is safe in paths and mount options; a driver never sees keys,
labels, images or engines. A volume's ancestry is passed in on each call, nearest parent first, so that a driver needs
no database of its own.

Life of a volume::

    create(v, parents) ──▶ writable ──▶ seal(v, parents) ──▶ immutable, may be a parent
           │                   │                                    │
           └───────────────────┴──────────── remove(v) ◀────────────┘

`create`, `seal` and `remove` are idempotent: called again after a crash at any point of the first call, they finish
the job. A half-made volume is never mistaken for a whole one, because the store calls `remove` before it tries again.

Two families share what they have in common: `layerfs.union.UnionDriver` for backends that hold only what a layer
changes (overlay2, aufs), `layerfs.snapshot.SnapshotDriver` for those that hold a whole tree (btrfs, zfs, devicemapper,
vfs). A driver is found by name through the entry-point group ``layerfs.drivers``; `layerfs.testing.DriverConformance`
is the suite that it has to pass.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol


class Capability(enum.Flag):
    """What a driver can do beyond the minimum, on the backing that it stands on."""

    NONE = 0
    SIZE_LIMIT = enum.auto()
    """`Driver.create` honours ``size``, and `Driver.resize` works."""
    NATIVE_CHANGES = enum.auto()
    """`Driver.changes` costs in proportion to what changed, not to the size of the tree."""
    NATIVE_USAGE = enum.auto()
    """`Driver.usage` asks the backend and does not walk the tree."""
    SHARED_CACHE = enum.auto()
    """Two layers over one parent share that parent's pages in the page cache."""
    BLOCK_COW = enum.auto()
    """A first write to a file of a lower layer copies blocks, not the whole file."""
    ROOTLESS = enum.auto()
    """Works without privileges on the host, in a user namespace of its own."""
    UPPER = enum.auto()
    """`Driver.upper` gives a place for a diff, also where the parents are not filled yet."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount that shows a layer, in the form that containerd's API and ``mount(8)`` use.

    Attributes:
        type: file system type, or ``bind``.
        source: device, directory, or a name without meaning (``overlay``).
        options: as in ``mount -o``; ``ro`` or ``rw`` among them. Colons, commas and backslashes inside overlay's
            directory options are escaped with a backslash, as the kernel's overlayfs documentation defines.
        target: path below the mount point; empty for the mount point itself.
    """

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""

    @property
    def read_only(self) -> bool:
        return "ro" in self.options


class ChangeKind(enum.StrEnum):
    ADDED = "added"
    MODIFIED = "modified"
    DELETED = "deleted"


class Change(NamedTuple):
    """One path that differs between a layer and its parent.

    Attributes:
        kind: what happened to it.
        path: relative to the layer's root, without a leading slash; ``""`` is the root itself. Bytes, because names
            on disk need not be UTF-8.
    """

    kind: ChangeKind
    path: bytes


@dataclass(frozen=True, slots=True)
class Usage:
    """What one layer alone occupies, without its parents.

    Attributes:
        size: bytes allocated on the backing for this layer only.
        inodes: files, directories and other inodes that it holds; -1 where the backend cannot say.
    """

    size: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a driver works on this host, and what to do if it does not.

    Attributes:
        usable: True when a store can be made with this driver here (perhaps on a sparse file as its backing).
        reason: one sentence: the mechanism found, or what is missing.
        remedy: the one thing to do about it, as a command or a setting; empty when usable.
    """

    usable: bool
    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """A defect that `Driver.check` or ``layerfs check`` found.

    Attributes:
        volume: the volume concerned, or "" for the backing as a whole.
        what: one sentence.
        repairable: True when `Driver.repair` can put it right without losing data.
    """

    volume: str
    what: str
    repairable: bool = False


class Whiteouts(Protocol):
    """How a tree that is being applied to takes deletions: by its backend's own marks, or by real removal."""

    def hide(self, dir_fd: int, name: bytes) -> None:
        """Make ``name`` of every lower layer invisible in the directory ``dir_fd``; remove it where it is here."""

    def make_opaque(self, dir_fd: int) -> None:
        """Hide all that lower layers hold in the directory ``dir_fd``; entries of this layer stay."""


@dataclass(frozen=True, slots=True)
class Upper:
    """A union volume's own directory, for writing a diff straight into it without a mount.

    Attributes:
        path: the directory that holds what the volume changes.
        whiteouts: the dialect in which deletions are marked there.
    """

    path: Path
    whiteouts: Whiteouts


@dataclass(frozen=True, slots=True)
class BackingNeed:
    """What a driver's data must live on.

    Attributes:
        filesystems: types that will do, best first, as in ``/proc/filesystems`` (or a kind of backing that is no file
            system); the first is what is made where none of them is there. Empty: any directory will do.
        why: one phrase for error texts.
    """

    filesystems: tuple[str, ...] = ()
    why: str = ""


class Driver(ABC):
    """One storage backend under one directory.

    Args:
        root: an existing directory, mode 0700, that belongs to this driver alone, on a backing that `needs` accepts.
        options: the driver's own settings (``redirect_dir=on``); an unknown one is `InvalidArgument`.
    """

    name: ClassVar[str]
    needs: ClassVar[BackingNeed] = BackingNeed()
    summary: ClassVar[str] = ""
    """One line for ``layerfs drivers``: what a layer is and what a child is."""

    def __init__(self, root: Path, options: Mapping[str, str] = MappingProxyType({})) -> None:
        self.root = root
        self.options = dict(options)

    @classmethod
    @abstractmethod
    def probe(cls, root: Path) -> Probe:
        """Say whether the backend works here, trying it for real where that is cheap (below 100 ms).

        ``root`` need not exist; its nearest existing ancestor tells the file system. Leaves nothing behind.
        """

    @property
    @abstractmethod
    def capabilities(self) -> Capability:
        """What works on this very backing; the conformance suite holds the driver to it."""

    @property
    def time_granularity(self) -> int:
        """The nanoseconds that the backend rounds times of files down to; 1 where it keeps them as they are."""
        return 1

    @property
    def most_mounted(self) -> int | None:
        """The most volumes that can be mounted at a time; None where there is no end."""
        return None

    @abstractmethod
    def create(self, volume: str, parents: Sequence[str], *, size: int | None = None) -> None:
        """Make a writable volume: a child of ``parents[0]``, or an empty tree (root directory 0755, owned by the
        caller) where ``parents`` is empty.

        ``size`` limits the bytes that the volume itself may hold; without `Capability.SIZE_LIMIT` it is
        `EnvironmentUnfit`. Raises `OutOfSpace`, `KernelRefused`.
        """

    @abstractmethod
    def fork(self, volume: str, source: str, parents: Sequence[str]) -> None:
        """Make ``volume`` a writable copy of the unsealed, unmounted volume ``source``, whose parents are ``parents``.

        The two are independent afterwards. Used to make an apply all-or-nothing.
        """

    @abstractmethod
    def seal(self, volume: str, parents: Sequence[str]) -> None:
        """Make a volume immutable, so that it can be a parent. It is not mounted by the store at that time."""

    @abstractmethod
    def remove(self, volume: str) -> None:
        """Take a volume away with all that it holds; one that is not there (or only half) is no error.

        It has no children then. Raises `FailedPrecondition` where the kernel says that it is in use.
        """

    @abstractmethod
    def mounts(self, volume: str, parents: Sequence[str], *, read_only: bool = False) -> list[Mount]:
        """The mounts that show the volume, in order, without mounting anything. Cheap: no I/O beyond a look-up.

        A sealed volume is only ever asked for with ``read_only=True``.
        """

    @abstractmethod
    def volumes(self) -> Iterator[str]:
        """Every volume that exists on the backing, whole or half made, in no order."""

    @abstractmethod
    def usage(self, volume: str, parents: Sequence[str]) -> Usage:
        """What the volume alone occupies."""

    @abstractmethod
    def changes(self, volume: str, parents: Sequence[str], old: int | None, new: int) -> Iterator[Change]:
        """What the volume changes against ``parents[0]``, in canonical order (see `layerfs.changes`).

        ``old`` and ``new`` are directory descriptors of the parent's and the volume's own tree as a user sees them;
        ``old`` is None where there is no parent. Every driver gives the same answer for the same two trees.
        """

    def upper(self, volume: str) -> Upper | None:
        """Where a diff can be written without a mount and without the parents; None where there is no such place."""
        return None

    def resize(self, volume: str, size: int) -> None:
        """Change a writable volume's size limit to ``size`` bytes. Needs `Capability.SIZE_LIMIT`."""
        raise NotImplementedError

    def check(self, volume: str, parents: Sequence[str]) -> Iterator[Problem]:
        """Defects of one volume that the backend itself can see, without reading file contents."""
        return iter(())

    def uncache(self, volume: str, parents: Sequence[str]) -> None:
        """Have what a sealed volume itself holds read anew from its backing the next time.

        Memory may hold what could not be written out. Raises `LayerfsError`.
        """

    def repair(self, volume: str, parents: Sequence[str]) -> None:
        """Put right what `check` called repairable."""

    def status(self) -> dict[str, str]:
        """Facts about the backing for people: file system, mechanism, space. Keys are short English phrases."""
        return {}

    def close(self) -> None:
        """Give back what this object holds (descriptors); volumes and the backing stay. Idempotent."""
