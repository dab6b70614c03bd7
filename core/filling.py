"""Fills a volume from a layer archive: straight into a union's upper directory where that gives the right tree.

Writing into an upper directory needs no mount and is faster, but a few archives can only be understood on top of the
parents' tree: hard links to a file of a lower layer, paths through a lower layer's links, directories that the archive
leaves out. Those are applied again, to the merged tree, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from layerfs import mounts
from layerfs.apply import Applied, NeedsParents, apply
from layerfs.beneath import directory
from layerfs.diff import nowhere, write_diff
from layerfs.driver import Driver
from layerfs.record import created
from layerfs.treecopy import copy_attributes
from layerfs.volume_dirs import opened


@dataclass(frozen=True, slots=True)
class Filling:
    """One archive on its way into one volume.

    Attributes:
        volume, parents: as a driver takes them.
        make: makes the volume as it is before the archive; it is called again after the volume was removed.
        source: opens the archive; more than once only if ``repeatable``.
        record: the file that gets the tar record.
        fresh: whether the volume changes nothing before the archive. What is in an upper directory already hides or is
            hidden by what the archive has in ways that only the whole tree tells.
        devices, verified, progress: see `layerfs.apply.apply`.
    """

    driver: Driver
    volume: str
    parents: Sequence[str]
    make: Callable[[], None]
    source: Callable[[], AbstractContextManager[BinaryIO]]
    repeatable: bool
    record: Path
    fresh: bool = True
    devices: bool = False
    verified: bool = False
    progress: Callable[[int], None] | None = None

    def fill(self) -> Applied:
        """Fill the volume, whose parents are whole. Raises what `layerfs.apply.apply` does; the volume stays then."""
        self.make()
        return self.finish(self.begin())

    def begin(self) -> Applied | None:
        """Do what needs nothing of the parents; None where that is nothing. The volume is made."""
        if not self.parents:
            return self._to_tree()
        upper = self.driver.upper(self.volume) if self.repeatable and self.fresh else None
        if upper is None:
            return None
        try:
            with opened(upper.path) as root, self._opened() as (stream, record):
                return apply(
                    stream,
                    root,
                    whiteouts=upper.whiteouts,
                    record=record,
                    devices=self.devices,
                    verified=self.verified,
                    progress=self.progress,
                )
        except NeedsParents:
            return None

    def finish(self, begun: Applied | None) -> Applied:
        """Make good what `begin` could not do; the parents are whole now."""
        if begun is None:
            self._start_again()
            return self._to_tree()
        if self.parents:
            with mounts.opened(self.driver.mounts(self.parents[0], self.parents[1:], read_only=True)) as below:
                if any(_exists(below, path) for path in begun.implied):
                    self._start_again()
                    return self._to_tree()
                if not begun.root:
                    self._inherit_root(below)
        return begun

    def shape(self) -> str:
        """The digest of what the volume changes, but for the contents of its files; it has been filled."""
        driver = self.driver
        with ExitStack() as stack:
            new = stack.enter_context(mounts.opened(driver.mounts(self.volume, self.parents, read_only=True)))
            old = None
            if self.parents:
                below = driver.mounts(self.parents[0], self.parents[1:], read_only=True)
                old = stack.enter_context(mounts.opened(below))
            changes = driver.changes(self.volume, self.parents, old, new)
            out = stack.enter_context(nowhere())
            return write_diff(changes, new, out, contents=False).diff_id

    def _start_again(self) -> None:
        self.driver.remove(self.volume)
        self.make()

    def _inherit_root(self, below: int) -> None:
        upper = self.driver.upper(self.volume)
        if upper is not None:
            with opened(upper.path) as root:
                copy_attributes(below, root)

    def _to_tree(self) -> Applied:
        with (
            mounts.opened(self.driver.mounts(self.volume, self.parents)) as root,
            self._opened() as (stream, record),
        ):
            return apply(
                stream, root, record=record, devices=self.devices, verified=self.verified, progress=self.progress
            )

    @contextmanager
    def _opened(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """The archive, and the file for its record."""
        with self.source() as stream, created(self.record) as record:
            yield stream, record


def _exists(tree: int, path: bytes) -> bool:
    """Whether the path, or a link or file on the way to it, is in the tree."""
    try:
        with directory(tree, path):
            return True
    except FileNotFoundError:
        return False
    except OSError:
        return True
