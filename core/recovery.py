"""Finishing or undoing what sessions left that ended in the middle of their work."""

from __future__ import annotations

from collections.abc import Callable

from layerfs.database import NOBODY, Row, State
from layerfs.errors import FailedPrecondition, LayerfsError
from layerfs.locks import living
from layerfs.mounting import Mounting
from layerfs.session import Session, log_failure, named
from layerfs.settling import Settling


class Recovery:
    """Takes over the work of dead sessions."""

    def __init__(self, session: Session, mounting: Mounting, settling: Settling) -> None:
        self._session = session
        self._database = session.database
        self._mounting = mounting
        self._settling = settling

    def run(self, *, given_up: bool = False, remove: Callable[[Row], object] | None = None) -> list[str]:
        """Recover what dead sessions left; what was done, for people.

        Cheap where there is nothing to do: one query, and one look at the lock file for each other session.

        Args:
            given_up: also try again what an earlier recovery, or an operation that failed, could not finish.
            remove: is called in place of `remove`; it may only see to it that the layer will be gone.
        """
        dead = self.dead()
        if not dead and not given_up:
            return []
        with self._database.transaction():
            dead &= self._database.owners()
            owners = [*dead, NOBODY] if given_up else dead
            rows = self._database.owned(*owners)
            volumes = self._database.stray_volumes(*owners)
            self._database.take_over(self._session.number, *owners)
            for number in dead:
                self._database.end_session(number)
        done = [self.finish_or_give_up(row, remove) for row in rows]
        done += [f"removed the unused volume {named(number)!r}" for number in volumes if self._session.discard(number)]
        if dead:
            self._settling.try_to_settle()
            done += self._mounting.tidy()
        return [what for what in done if what]

    def dead(self) -> set[int]:
        """The sessions that live no more and left something, whether or not they got to their end."""
        others = self._database.owners() - {NOBODY, self._session.number}
        return others - living(self._session.locks, others)

    def finish(self, row: Row, remove: Callable[[Row], object] | None = None) -> str:
        """Finish or undo the work on a layer that this session owns; what was done, for people. As for `run`."""
        match row.state:
            case State.CREATING | State.REMOVING:
                (remove or self.remove)(row)
                return f"removed the half-made or half-removed layer {row.key!r}"
            case State.BUSY:
                self.unlock(row)
                return f"broke off an operation on the layer {row.key!r}"
            case State.SEALING:
                self.seal(row)
                return f"finished the commit of the layer {row.key!r} to {row.new_key!r}"
            case State.READY:
                self._database.change(row.number, owner=None)
                return ""

    def finish_or_give_up(self, row: Row, remove: Callable[[Row], object] | None = None) -> str:
        """As `finish`; what fails is logged and left for later."""
        try:
            return self.finish(row, remove)
        except Exception as error:
            log_failure(f"the work on the layer {row.key!r} ({row.state}) is left for later", error)
        self._leave(row)
        return ""

    def remove(self, row: Row) -> None:
        """Take away a layer that is being removed. Raises `FailedPrecondition` where a child of it could not be."""
        if children := self._database.children(row.number):
            raise FailedPrecondition(f"the layer {row.key!r} still has children, as {children[0]!r}")
        self._mounting.take_down(row)
        if row.volume is not None:
            self._session.driver.remove(named(row.volume))
            self._session.record(row.volume).unlink(missing_ok=True)
        with self._database.transaction():
            self._database.delete(row.number)
            if row.volume is not None:
                self._database.delete_volume(row.volume)
        self._session.reserve.hold()

    def seal(self, row: Row) -> None:
        """Finish a commit, whose layer is marked as one whose data may not be written out."""
        self._mounting.take_down(row)
        volume, parents = self._session.volumes(row)
        self._session.driver.seal(volume, parents)
        at_once = self._settling.is_waited_for
        if at_once:
            self._settling.write_out([row.number])
        assert row.new_key is not None
        assert row.new_labels is not None
        with self._database.transaction(durable=at_once):
            self._database.commit(row.number, row.new_key, row.new_labels)
        if not at_once:
            self._settling.write_out([row.number])

    def unlock(self, row: Row) -> None:
        """Let a layer be as it was before an operation began."""
        self._session.note(row.number, state=State.READY, owner=None, new_key=None, new_labels=None)
        self._database.settle([row.number])

    def give_up(self, row: Row, error: Exception) -> None:
        """After a failure: let the layer be as it was if nothing has been done to it, else leave it for later."""
        if isinstance(error, FailedPrecondition):
            self.unlock(row)
        else:
            self._leave(row)

    def _leave(self, row: Row) -> None:
        try:
            self._session.note(row.number, owner=NOBODY)
        except LayerfsError as error:  # it stays this session's, and the next one sees to it
            log_failure(f"noting that of the layer {row.key!r}", error)
