"""When the data of committed layers is written out, and which layers a crash of the machine leaves in doubt.

A commit is marked in the database before it begins, with the machine's boot. The mark goes when syncfs(2) has written
the data out: before `Store.commit` returns, or a moment later for all commits of that moment together. A mark of an
earlier boot says that the machine went down in between: files of that layer may be empty or short, and nothing but its
diff ID can tell.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

from layerfs.errors import LayerfsError
from layerfs.session import Session

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
        self.sync: Final = sync
        self._session = session
        self._database = session.database
        self._some = threading.Event()
        self._closing = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def write_out(self, numbers: Iterable[int]) -> None:
        """Write out the data of marked layers and take their marks away: now, or in a thread a moment later.

        Raises `OutOfSpace`, `KernelRefused`.
        """
        if self.sync is Sync.COMMIT:
            self._session.sync()
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
            self._session.sync()
            self._database.settle(marked, boot())

    def close(self) -> None:
        """Write out what is left. Where that fails, the marks stay for the next session."""
        self._closing.set()
        self._some.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            with contextlib.suppress(LayerfsError):
                self.settle()

    def _work(self) -> None:
        while not self._closing.is_set():
            self._some.wait()
            self._closing.wait(_PAUSE)
            self._some.clear()
            with contextlib.suppress(LayerfsError):  # the marks stay, and the next commit tries again
                self.settle()


@cache
def boot() -> str:
    """The kernel's name for the time since the machine was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
