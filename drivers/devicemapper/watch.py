"""A thread that makes the pool larger in time while others write to it, which no call tells the driver of.

It sleeps until the kernel has an event of the device-mapper, such as that of a pool with a quarter left. There is at
most one for each driver that is open, from the first volume that it gives somebody to write to until it is closed. What
containers write when no process has the store open is seen to by the next that opens it.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

from layerfs.errors import LayerfsError
from layerfs.kernel import dm

_EVERY = 30_000  # milliseconds, for what there is no event of: room on the file system below


class Watch:
    """Calls ``extend``, in a thread, whenever the pool may need it; which raises `OSError` when that is gone."""

    def __init__(self, extend: Callable[[], None]) -> None:
        self._extend = extend
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = -1

    def start(self) -> None:
        """Begin, if it has not begun; a process that was forked begins anew."""
        if self._thread is not None and self._thread.is_alive():
            return
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._end()
                self._stop = os.eventfd(0, os.EFD_CLOEXEC)
                self._thread = threading.Thread(target=self._work, args=(self._stop,), daemon=True, name="pool watch")
                self._thread.start()

    def close(self) -> None:
        """End the thread. Idempotent; `start` begins again."""
        with self._starting:
            self._end()

    def _end(self) -> None:
        if self._thread is not None:
            if self._thread.is_alive():
                os.eventfd_write(self._stop, 1)
                self._thread.join()
            os.close(self._stop)
            self._thread = None

    def _work(self, stop: int) -> None:
        with contextlib.suppress(OSError), contextlib.closing(dm.Events()) as events:
            poll = select.poll()
            poll.register(stop, select.POLLIN)
            poll.register(events, select.POLLIN)
            found: list[tuple[int, int]] = []
            while stop not in (fd for fd, _ in found):
                events.arm()
                with contextlib.suppress(LayerfsError):  # whoever needs the space is told so
                    self._extend()
                found = poll.poll(_EVERY)
