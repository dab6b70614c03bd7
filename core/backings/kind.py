"""What a kind of backing has to do, and the plain values that describe one backing.

The common part (`layerfs.backing.Backing`) keeps the state file, holds the lock and decides what is to be done; a kind
does it. The life of a backing, with the state file between the steps::

    validate ─▶ prepare ─▶ (state: not made) ─▶ make ─▶ (state: made) ─▶ up ⇄ down ─▶ erase ─▶ (no state)
                                                                     enlarge ─▶ (state: size) ─▶ grow

Every step is called again after a crash at any point of it, and then finishes the job; none may leave anything behind
that `down` and `erase` would not find. What a step needs to know later, it derives from ``root``, ``spec``, ``uuid``.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from layerfs.errors import InvalidArgument

DIRECTORY = "dir"
"""The kind of backing that is nothing but a directory of the file system that is there."""


@dataclass(frozen=True, slots=True)
class BackingSpec:
    """What a backing is to be; plain values only, so that `dataclasses.asdict` of it is JSON.

    Attributes:
        filesystem: the kind, one of `layerfs.backing.FILESYSTEMS`: ``dir``, or what is made: ``btrfs``, ``ext4`` (with
            project quota where the kernel has it), ``xfs``, ``xfs-noreflink`` (whose files share no blocks), ``zfs`` (a
            pool, see `layerfs.backings.zpool`).
        size: bytes of the sparse file; None is 80 % of what is free, at most 1 TiB. Not for ``dir`` or a device.
        device: a block device to use instead of a sparse file.
        metadata_size: bytes of a second sparse file, for kinds that keep metadata apart; None lets the kind choose.
        metadata_device: a second block device, for the metadata of such a kind; only together with ``device``.
        largest: bytes up to which a sparse file becomes larger by itself, for kinds that do that; None is what the file
            system below has room for, ``size`` keeps it as it is.
    """

    filesystem: str = DIRECTORY
    size: int | None = None
    device: str | None = None
    metadata_size: int | None = None
    metadata_device: str | None = None
    largest: int | None = None


class Space(NamedTuple):
    """Bytes that can still be written, and bytes in all."""

    free: int
    total: int


class Kind(ABC):
    """One backing of some kind; its methods are called with the backing's lock held.

    Args:
        root: the backing's directory, where the kind may keep `files`.
        spec: what it is to be, or since `prepare` what it is.
        uuid: chosen for this backing alone; what is made carries it, so that it is known again.
    """

    files: ClassVar[tuple[str, ...]] = ()
    """Names below ``root`` that the kind makes, beside ``data``; they are deleted in the end."""

    def __init__(self, root: Path, spec: BackingSpec, uuid: str) -> None:
        self.root = root
        self.spec = spec
        self.uuid = uuid

    @property
    def path(self) -> Path:
        """The directory below which the driver's data lies."""
        return self.root / "data"

    @classmethod
    @abstractmethod
    def validate(cls, spec: BackingSpec) -> None:
        """Raise `InvalidArgument` for a spec that cannot be, without looking at the host."""

    @abstractmethod
    def prepare(self, *, force: bool) -> BackingSpec:
        """The spec with its sizes filled in, after a look at the host; nothing is changed.

        Raises `EnvironmentUnfit` for a missing package or privilege, `FailedPrecondition` for a device that is in use
        or, without ``force``, has anything on it that does not carry ``uuid``.
        """

    @abstractmethod
    def make(self) -> None:
        """Make it, whatever an earlier call left half made. Where it fails, `erase` is called."""

    @abstractmethod
    def is_up(self) -> bool:
        """Whether `path` can be used now."""

    @abstractmethod
    def up(self) -> None:
        """Make `path` usable; it exists as a directory. Not called where `is_up`."""

    @abstractmethod
    def down(self) -> None:
        """Undo `up`, whole or half done. Raises `FailedPrecondition` naming what uses it, and leaves it up then."""

    @abstractmethod
    def enlarge(self, size: int) -> BackingSpec:
        """Make the place (not yet what is on it) ``size`` bytes large; the spec as it is then.

        On a device ``size`` is ignored. Raises `InvalidArgument` for less than there is.
        """

    @abstractmethod
    def grow(self) -> None:
        """Use the whole place; up or down afterwards as before."""

    def outgrown(self) -> int | None:
        """What `enlarge` and `grow` are to be called with now, so that it does not become full; None: nothing to do.

        It is also what finishes a `grow` that was broken off; it may then be the present size. Called without the lock,
        too, as a first look.
        """
        return None

    def failures(self) -> int:
        """How often writes have failed for want of space since it was made, as far as the kind keeps count."""
        return 0

    @abstractmethod
    def erase(self) -> None:
        """Take from a device what `make` put there; sparse files among `files` go by themselves. It is down."""

    def space(self) -> Space:
        """What is free and what there is. It is up."""
        return Space(free_bytes(self.path), total_bytes(self.path))

    def facts(self) -> dict[str, str]:
        """What a driver has to know to use it, such as a pool's name; no I/O."""
        return {}


def refuse_pool_settings(spec: BackingSpec) -> None:
    """Raise `InvalidArgument` where a spec for a kind other than a thin pool gives what only that knows."""
    if spec.metadata_size is not None or spec.metadata_device is not None:
        raise InvalidArgument(f"a backing of kind {spec.filesystem!r} keeps no metadata apart; leave that out")
    if spec.largest is not None:
        raise InvalidArgument(f"a backing of kind {spec.filesystem!r} does not grow by itself; leave its end out")


def free_bytes(path: Path) -> int:
    """Bytes that can still be written to the file system at ``path``."""
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def total_bytes(path: Path) -> int:
    """The size in bytes of the file system at ``path``."""
    info = os.statvfs(path)
    return info.f_blocks * info.f_frsize
