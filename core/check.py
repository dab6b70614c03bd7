"""Finds what is wrong in a store, and puts right what can be put right without losing data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from layerfs.database import NOBODY, Row, State
from layerfs.driver import Problem
from layerfs.errors import LayerfsError, refused
from layerfs.images import Images
from layerfs.layer import Kind
from layerfs.mounting import Mounting
from layerfs.recovery import Recovery
from layerfs.session import Session, named
from layerfs.settling import Settling, boot
from layerfs.transfer import Transfer


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: ``damaged`` (not what was put there), ``half-made`` (work that was broken off), ``orphaned`` (nothing
            needs it) or ``image`` (an image lacks something).
        name: the layer's key, the image's or volume's name; ``""`` for the store as a whole.
        what: one sentence.
        repairable: whether `Store.check` with ``repair`` can put it right.
        repaired: whether it did.
    """

    kind: str
    name: str
    what: str
    repairable: bool = False
    repaired: bool = False


Progress = Callable[[int, int, str], object]
"""Is called with layers done, layers in all, and the key of the layer that is looked at."""


class Check:
    """Looks at everything in one session's store."""

    def __init__(
        self,
        session: Session,
        mounting: Mounting,
        settling: Settling,
        recovery: Recovery,
        transfer: Transfer,
        images: Images,
    ) -> None:
        self._session = session
        self._database = session.database
        self._mounting = mounting
        self._settling = settling
        self._recovery = recovery
        self._transfer = transfer
        self._images = images

    def run(self, *, repair: bool, progress: Progress | None) -> list[Finding]:
        """Everything that is wrong, or was until now."""
        found = [*self._half_made(repair), *self._orphans(repair)]
        rows = [row for row in self._database.rows() if row.state is State.READY]
        there = set(self._session.driver.volumes())
        for done, row in enumerate(rows):
            if progress is not None:
                progress(done, len(rows), row.key)
            found += self._layer(row, there, repair)
        if progress is not None:
            progress(len(rows), len(rows), "")
        return found + [Finding("image", name, what) for name, what in self._images.defects()]

    def collect(self) -> list[str]:
        """Take away what nothing needs any more; a sentence for each thing."""
        done = self._recovery.run(given_up=True)
        done += [f"removed {one.what}" for one in self._orphans(repair=True) if one.repaired]
        return done + self._images.collect_garbage() + self._mounting.tidy()

    def _half_made(self, repair: bool) -> Iterator[Finding]:
        """Work that failed half-way in this session or in one that has ended."""
        rows = self._database.owned(NOBODY, *self._recovery.dead())
        for row in rows:
            yield Finding("half-made", row.key, f"an operation on it failed half-way ({row.state})", True)
        if repair:
            self._recovery.run(given_up=True)
            left = {row.number for row in self._database.owned(NOBODY, self._session.number)}
            for row in rows:
                if row.number not in left:
                    yield Finding("half-made", row.key, "it was finished or undone", True, repaired=True)

    def _orphans(self, repair: bool) -> Iterator[Finding]:
        """Volumes and records that the database knows nothing of."""
        # In this order: what is made meanwhile is in the database before it is on the backing, and what is removed
        # meanwhile is on the backing no longer when it is no longer in the database.
        volumes, records = set(self._session.driver.volumes()), set(os.listdir(self._session.records))
        known = {named(number) for number in self._database.volumes()}
        if not known >= volumes | records:
            volumes &= set(self._session.driver.volumes())
            records &= set(os.listdir(self._session.records))
        for name in sorted(volumes - known):
            finding = Finding("orphaned", name, f"the volume {name!r}, which belongs to no layer", True)
            yield self._repaired(finding, partial(self._session.driver.remove, name)) if repair else finding
        for name in sorted(records - known):
            finding = Finding("orphaned", name, f"the tar record {name!r}, which belongs to no layer", True)
            path = self._session.records / name
            yield self._repaired(finding, path.unlink) if repair else finding

    @staticmethod
    def _repaired(finding: Finding, action: Callable[[], object]) -> Finding:
        try:
            action()
        except (LayerfsError, OSError) as error:
            return replace(finding, what=f"{finding.what}, could not be taken away: {error}")
        return replace(finding, repaired=True)

    def _layer(self, row: Row, there: set[str], repair: bool) -> Iterator[Finding]:
        """What is wrong with one layer: its volume, and where it is committed its content."""
        if row.volume is None:
            return
        volume, parents = self._session.volumes(row)
        if volume not in there:
            if self._is_still_there(row):
                yield Finding("damaged", row.key, f"its volume {volume!r} is missing on the backing")
            return
        try:
            problems = list(self._session.driver.check(volume, parents))
        except LayerfsError as error:
            problems = [Problem(volume, str(error))]
        for problem in problems:
            yield self._treated(row, problem, parents, repair)
        in_doubt = self._database.is_doubtful(row.number, boot())
        if row.kind is Kind.COMMITTED and row.layer.diff_id and all(problem.repairable for problem in problems):
            try:
                if in_doubt:
                    self._uncache(volume, parents)
                self._transfer.verify(row)
            except LayerfsError as error:
                if self._is_still_there(row):
                    yield Finding("damaged", row.key, str(error))
                return
            if in_doubt:  # else a mark says that its data is being written out, which this has not done
                self._database.settle([row.number])
        elif in_doubt:
            what = (
                "it was committed just before the machine went down, or writing it out failed: files may be incomplete"
            )
            finding = Finding("damaged", row.key, what, True)
            yield self._repaired(finding, partial(self._database.settle, [row.number])) if repair else finding

    def _uncache(self, volume: str, parents: list[str]) -> None:
        """Have a layer read from the disk: what memory holds is not what a failed writing out has left there."""
        self._settling.sync()
        try:
            self._session.driver.uncache(volume, parents)
        except OSError as error:
            raise refused(f"reading the volume {volume!r}", error) from error

    def _treated(self, row: Row, problem: Problem, parents: list[str], repair: bool) -> Finding:
        finding = Finding("damaged", row.key, problem.what, problem.repairable)
        if not (repair and problem.repairable):
            return finding
        return self._repaired(finding, lambda: self._session.driver.repair(problem.volume, parents))

    def _is_still_there(self, row: Row) -> bool:
        """Whether nobody has removed the layer meanwhile."""
        now = self._database.numbered(row.number)
        return now is not None and now.state is State.READY and now.volume == row.volume
