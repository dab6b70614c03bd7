"""When the data of committed layers is written out, and which layers a crash of the machine leaves in doubt.

A commit is marked in the database before it begins, with the machine's boot. The mark goes when syncfs(2) has written
the data out: before `Store.commit` returns, or a moment later for all commits of that moment together. A mark of an
earlier boot says that the machine went down in between: files of that layer may be empty or short, and nothing but its
diff ID can tell.

The same is so where syncfs(2) fails. The kernel tells of what it could not write once and forgets it, so that the next
success means nothing for what was marked before: those marks become marks of no boot.
"""

from __future__ import annotations

import enum
import os
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

from layerfs.database import Database, Row
from layerfs.errors import Damaged, refused
from layerfs.kernel.libc import check, libc
from layerfs.session import Session, log, log_failure

_PAUSE: Final = 1.0
"""Seconds from a commit to the writing out of its data, where that comes later."""


class Sync(enum.StrEnum):
    """When the data of a layer that is committed is written out."""

    COMMIT = "commit"
    """Before the commit returns: a committed layer outlasts a crash of the machine."""
    LATER = "later"
    """About a second later, beside other work. A layer that a crash of the machine leaves in doubt is refused as a
    parent until `Store.check` has verified it, or accepts it with ``repair``."""


class Settling:
    """Writes out what one session commits.

    Args:
        sync: when.
    """

    def __init__(self, session: Session, sync: Sync) -> None:
        self.when: Final = sync
        self._session = session
        self._database = session.database
        self._some = threading.Event()
        self._closing = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failed = False

    def sync(self) -> None:
        """Have the data on the backing written out, see syncfs(2). Raises `OutOfSpace`, `KernelRefused`."""
        step = f"writing out the data of the store {str(self._session.root)!r}"
        try:
            fd = os.open(self._session.backing.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise refused(step, error) from error
        try:
            if self._failed:
                self._doubt()
            check(libc.syncfs(fd))
        except OSError as error:
            self._failed = True
            self._doubt()
            raise refused(step, error) from error
        finally:
            os.close(fd)

    def _doubt(self) -> None:
        """After a failure: what is marked cannot be trusted any more."""
        self._session.reserve.use()
        for name in self._database.doubt(boot()):
            log.error("files of the layer %r may be incomplete, as writing them out failed; run `layerfs check`", name)
        self._failed = False

    @property
    def is_waited_for(self) -> bool:
        """Whether a commit is to outlast a crash of the machine when it returns."""
        return self.when is Sync.COMMIT

    def write_out(self, numbers: Iterable[int]) -> None:
        """Write out the data of marked layers and take their marks away: now, or in a thread a moment later.

        Raises `OutOfSpace`, `KernelRefused`.
        """
        if self.is_waited_for:
            self.sync()
            self._database.settle(numbers, boot())
            return
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="settle")
                self._thread.start()
        self._some.set()

    def settle(self) -> None:
        """Write out all that is marked with this boot, by whatever session. Raises `OutOfSpace`, `KernelRefused`."""
        if marked := self._database.unsettled(boot()):
            self.sync()
            self._database.settle(marked, boot())

    def close(self) -> None:
        """Write out what is left. Where that fails, the marks stay for the next session."""
        self._closing.set()
        self._some.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.try_to_settle()

    def try_to_settle(self) -> None:
        """As `settle`; what fails is logged, and the marks stay for another time."""
        try:
            self.settle()
        except Exception as error:
            log_failure("layers that were committed are not written out yet", error)

    def _work(self) -> None:
        while not self._closing.is_set():
            self._some.wait()
            self._closing.wait(_PAUSE)
            self._some.clear()
            self.try_to_settle()


def check_written_out(database: Database, row: Row) -> None:
    """Refuse a layer that is in doubt (`Damaged`): nothing is to be built on it."""
    if database.is_doubtful(row.number, boot()):
        raise Damaged(
            f"the layer {row.key!r} was committed just before the machine went down, or writing it out failed, and its "
            "files may be incomplete; `layerfs check` verifies it by its diff ID, `layerfs check --repair` accepts a "
            "layer without one as it is"
        )


@cache
def boot() -> str:
    """The kernel's name for the time since the machine was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
